"""Rewards as data: a table over the signed error, rule rows, and a proof over everything they can give."""

from rewards.overlong import Overlong, overlong
from rewards.parse import parse_answer
from rewards.reward import Reward, dump_reward, load_reward
from rewards.rules import NumberTrigger, PatternTrigger, Rule
from rewards.types import Answer, FiredRule, RewardError, RuleInput, Score

__all__ = [
    "Answer",
    "FiredRule",
    "NumberTrigger",
    "Overlong",
    "PatternTrigger",
    "Reward",
    "RewardError",
    "Rule",
    "RuleInput",
    "Score",
    "dump_reward",
    "load_reward",
    "overlong",
    "parse_answer",
]
