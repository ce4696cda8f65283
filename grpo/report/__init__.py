"""A run as a page: ``python -m grpo report RUN [RUN …]`` writes one self-contained HTML file."""
