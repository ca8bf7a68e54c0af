import json
from pathlib import Path

import datasets


def dataset(file, **_):
    """The questions of a JSON lines file beside this one, as the split "test"; the harness adds its own keywords."""
    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return datasets.DatasetDict(test=datasets.Dataset.from_list([json.loads(line) for line in lines]))
