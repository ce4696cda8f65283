"""One run: its setup, folder, checkpoints, ledger, resume and exit messages."""
