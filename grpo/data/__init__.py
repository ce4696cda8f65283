"""One module per file format, read row by row into `CaseRow`s and `RowNote`s; `grpo.cases.LOADERS` lists them."""
