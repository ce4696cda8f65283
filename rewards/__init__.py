"""Rewards as data: a table over the signed error, rule rows, and a proof over all they can say."""

from rewards.parse import parse_answer
from rewards.reward import Reward, load_reward
from rewards.rules import NumberTrigger, PatternTrigger, Rule
from rewards.types import Answer, Fired, RewardError, Score, View

__all__ = [
    "Answer",
    "Fired",
    "NumberTrigger",
    "PatternTrigger",
    "Reward",
    "RewardError",
    "Rule",
    "Score",
    "View",
    "load_reward",
    "parse_answer",
]
