"""KTK_* variables: values, and that nothing unknown passes."""

from __future__ import annotations

import pytest

from ktk import env


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("KTK_NUM_THREADS", "0", env.num_threads),
        ("KTK_NUM_THREADS", "two", env.num_threads),
        ("KTK_STRICT_BACKEND", "yes", env.strict_backend),
        ("KTK_LOG", "loud", env.log_level),
        ("KTK_TILE", "1", env.tiles_are_emulated),
    ],
)
def test_bad_values_name_variable_and_value(monkeypatch, name: str, value: str, read) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}='{value}': must be"):
        read()


def test_good_values_and_defaults(monkeypatch) -> None:
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert (env.num_threads(), env.backend(), env.strict_backend(), env.log_level()) == (
        None,
        None,
        False,
        "warning",
    )
    monkeypatch.setenv("KTK_NUM_THREADS", " 3 ")
    monkeypatch.setenv("KTK_STRICT_BACKEND", "1")
    monkeypatch.setenv("KTK_LOG", "DEBUG")
    assert (env.num_threads(), env.strict_backend(), env.log_level()) == (3, True, "debug")
    assert env.in_effect() == {
        "KTK_NUM_THREADS": "3",
        "KTK_STRICT_BACKEND": "1",
        "KTK_LOG": "DEBUG",
    }


def test_a_misspelt_variable_is_an_error(monkeypatch) -> None:
    monkeypatch.setenv("KTK_NUM_THREAD", "2")
    with pytest.raises(ValueError, match="KTK_NUM_THREAD is unknown: ktk has KTK_BACKEND"):
        env.backend()
