"""One module a file format. Each reads its files row by row into `Record`s, `Banded`s and `Remark`s (`row_report.py`).

No format knows another, and none knows the trainer; `grpo.cases.LOADERS` is the table that names them.
"""
