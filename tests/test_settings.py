"""Settings: environment over config file over defaults, and clear errors for what is malformed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifactfs import settings
from artifactfs.errors import UsageError


def load(home: Path, **environ: str) -> settings.Settings:
    return settings.load({"HOME": str(home), **environ})


def write_config(home: Path, text: str | bytes) -> Path:
    path = home / ".config" / "artifactfs" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_defaults(tmp_path: Path) -> None:
    found = load(tmp_path)
    assert found.store == str(tmp_path / ".local/share/artifactfs/store")
    assert found.cache_dir == tmp_path / ".cache/artifactfs"
    assert found.staging_dir == tmp_path / ".local/share/artifactfs/stages"
    assert found.state_dir == tmp_path / ".local/state/artifactfs"
    assert found.cache_size == 10 * 2**30
    assert (found.entity, found.project) == ("", "")


def test_xdg_directories(tmp_path: Path) -> None:
    found = load(tmp_path, XDG_DATA_HOME="/d", XDG_CACHE_HOME="/c", XDG_STATE_HOME="/s", XDG_CONFIG_HOME="/none")
    assert found.store == "/d/artifactfs/store"
    assert found.cache_dir == Path("/c/artifactfs")
    assert found.state_dir == Path("/s/artifactfs")


def test_relative_xdg_directory_is_ignored(tmp_path: Path) -> None:
    """As the XDG specification asks."""
    assert load(tmp_path, XDG_CACHE_HOME="cache").cache_dir == tmp_path / ".cache/artifactfs"


def test_environment_wins_over_config_file(tmp_path: Path) -> None:
    write_config(tmp_path, 'store = "/srv/a"\nentity = "acme"\nproject = "vision"\ncache_size = "1GiB"\n')
    found = load(tmp_path, ARTIFACTFS_STORE="/srv/b", ARTIFACTFS_PROJECT="nlp")
    assert (found.store, found.entity, found.project, found.cache_size) == ("/srv/b", "acme", "nlp", 2**30)


def test_empty_environment_value_counts_as_unset(tmp_path: Path) -> None:
    write_config(tmp_path, 'entity = "acme"\n')
    assert load(tmp_path, ARTIFACTFS_ENTITY="").entity == "acme"


def test_tilde_is_expanded(tmp_path: Path) -> None:
    found = load(tmp_path, ARTIFACTFS_STORE="~/store", ARTIFACTFS_CACHE_DIR="~", ARTIFACTFS_STAGING_DIR="~/stages")
    assert (found.store, found.cache_dir, found.staging_dir) == (f"{tmp_path}/store", tmp_path, tmp_path / "stages")


def test_number_in_config_file(tmp_path: Path) -> None:
    write_config(tmp_path, "cache_size = 4096\n")
    assert load(tmp_path).cache_size == 4096


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("store = ", "cannot be read"),
        (b"store = '\xff'\n", "cannot be read"),
        ("sotre = 'x'\n", "unknown key 'sotre'"),
        ("store = ['a']\n", "store must be a string"),
        ("store = 1.5\n", "store must be a string"),
        ("[store]\na = 1\n", "store must be a string"),
        ("cache_size = true\n", "cache_size 'True' is not a size"),
    ],
)
def test_malformed_config_file(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = write_config(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "cache_size" in str(caught.value)


def test_unreadable_config_file(tmp_path: Path) -> None:
    write_config(tmp_path, "").unlink()
    (tmp_path / ".config/artifactfs/config.toml").mkdir()
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path)


def test_unknown_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(UsageError, match="set HOME"):
        settings.load({})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("1k", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        (" 500 MB ", 500 * 10**6),
        ("10G", 10**10),
        ("10GiB", 10 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("2T", 2 * 10**12),
        ("2tib", 2**41),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert settings.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1e9", "1 x", "10i", "GiB", "1,5GiB", "1.", ".5", "٣", "9" * 400, "1\n2", "nan", "inf"]
)
def test_malformed_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        settings.parse_size(text, "cache_size")


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        assert settings.parse_size(text) >= 0
    except UsageError as error:
        assert "\n" not in str(error)


@given(st.integers(0, 2**63), st.sampled_from([("", 1), ("KiB", 2**10), ("MiB", 2**20), ("GB", 10**9)]))
def test_whole_sizes_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert settings.parse_size(f"{number}{unit[0]}") == number * unit[1]
