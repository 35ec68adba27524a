"""Paths in settings: home folders, and what relative ones start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysched.config.loading import load
from raysched.config.paths import anchored, user_path
from raysched.errors import ConfigError


def test_an_unknown_home_folder_is_a_clear_message() -> None:
    with pytest.raises(ConfigError, match=r"data\.path: ~nobody-here/x: the home folder"):
        user_path("~nobody-here/x", "data.path")


def test_relative_data_paths_start_from_the_commands_folder() -> None:
    config = load(None, ["data.source=image_folder", "data.path=my images"]).config
    data = anchored(config, Path("/work here")).data
    assert (data.path, data.cache_dir) == ("/work here/my images", None)


def test_absolute_data_paths_stay() -> None:
    config = load(None, ["data.cache_dir=/cache"]).config
    assert anchored(config, Path("/work here")) == config
