"""Class names from a file: as many as there are classes, or any number."""

import pytest

from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.labels import read_labels


def test_as_many_as_classes_if_their_number_is_known(tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("cat\ndog\n")
    assert read_labels(file, 2) == read_labels(file, 0) == ("cat", "dog")
    with pytest.raises(ModelLoadError, match="has 2 names, but the model has 3 classes"):
        read_labels(file, 3)
