"""A pytest plugin that gives every test, and every process it starts, a known environment.

pytest loads it (``-p`` in pyproject.toml) before anything imports torch or transformers, which read theirs at import.
"""

import os
import re
import sys
import warnings
from pathlib import Path

import pytest

OBEYED = re.compile(
    "COLUMNS|LINES|TERM|COLORTERM|(NO|FORCE)_COLOR|CLICOLOR.*|TQDM_.*|"  # what a terminal shows
    "(HF|HUGGINGFACE|TRANSFORMERS|PYTORCH|TORCH|TORCHELASTIC)_.*|TRITON_INTERPRET|"  # how the libraries work
    "(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|"  # the place among several ranks
    "PYTHON(WARNINGS|IOENCODING|UTF8|COERCECLOCALE|OPTIMIZE|INSPECT|VERBOSE|PROFILEIMPORTTIME)"
)
"""Variables that the program or its libraries obey by design. A test that is about one of them sets it itself.

The locale, the time zone, the home folder, the folder for temporary files, the number of threads and the file mode
mask stay as they are: nothing may depend on them, and ``.ci/run`` sets odd ones.
"""


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    for name in [name for name in os.environ if OBEYED.fullmatch(name)]:
        del os.environ[name]
    os.environ["PYTHONIOENCODING"] = "utf-8"  # of the processes that tests start, whose output they read
    os.environ["HF_HOME"] = str(Path(os.devnull) / "hub")  # no model that happens to be on this machine is seen
    if sys.warnoptions:  # from PYTHONWARNINGS; pytest adds its own later
        sys.warnoptions.clear()
        warnings.resetwarnings()
