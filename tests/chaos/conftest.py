from pathlib import Path

import pytest

from tests.training.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with ``train`` (20 steps of the tiny config read it more than once) and ``validation``."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train", n_documents=120, seed=0)
    write_corpus(folder / "validation", n_documents=15, seed=1)
    return folder
