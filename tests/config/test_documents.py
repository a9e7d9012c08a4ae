"""Files that others wrote: read within bounds, or refused in one line."""

import json
import os
import time

import pytest

from rlx.config.documents import Unreadable, parse_json, parse_yaml, read_file, read_json
from rlx.runs.folders import parse_settings

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
CHAIN = "a0: x\n" + "".join(f"a{i}: '${{a{i - 1}}}${{a{i - 1}}}'\n" for i in range(1, 40))
LISTS = "a0: x\n" + "".join(f"a{i}: ['${{a{i - 1}}}', '${{a{i - 1}}}']\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 50_000, "{a: " * 50_000, "- " * 50_000, "? " * 50_000, "&a " * 9999, BOMB),
        *("a: \x00", "\ta: 1", "{[1]: 2}", "{{}: 2}", "a: !!python/name:os.system", "!!set {a}"),
        *(
            "a: !!binary aGk=",
            "a: !!timestamp 2020-99-99",
            "!!omap [a: 1]",
            "9" * 400,
            "0x" + "f" * 99,
        ),
        *(
            "1" + ":59" * 9999,
            "a: !x 1",
            "a: [",
            "%YAML 9",
            "a: *nope",
            "x" * 2_000_000,
            "? null\n: 1",
        ),
    ],
    ids=lambda text: text[:20],
)
def test_no_yaml_takes_more_than_its_file(text):
    began = time.monotonic()
    with pytest.raises(Unreadable) as refused:
        parse_yaml(text.encode())
    assert len(str(refused.value).splitlines()) == 1
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text",
    [
        *("[" * 50_000, '{"a": ' * 50_000, "[" * 99 + "]" * 99, "9" * 400, '{"a": -' + "1" * 5000),
        *("", "{", "\x00", "nope", "[1]]"),
    ],
    ids=lambda text: text[:20],
)
def test_no_json_takes_more_than_its_file(text):
    with pytest.raises(Unreadable) as refused:
        parse_json(text.encode())
    assert len(str(refused.value).splitlines()) == 1


def test_half_a_pair_is_a_question_mark():
    value = {"a": "\ud800", "b": "\U0001f600", "\udfff": 1}
    assert parse_json(json.dumps(value)) == {"a": "?", "b": "\U0001f600", "?": 1}


def test_what_is_in_strings_is_neither_deep_nor_long():
    value = {
        "a": "[" * 999,
        "b": '"[' * 99,
        "c": "9" * 400,
        "d": "\U0001f600",
        "e": 2**128,
        "f": "\\",
    }
    assert parse_json(json.dumps(value)) == value
    text = 'a: "' + "[" * 999 + '"\nb: 2026-11-28\nc: 1e-3\n'
    assert parse_yaml(text.encode()) == {"a": "[" * 999, "b": "2026-11-28", "c": 0.001}


@pytest.mark.parametrize("text", [CHAIN, LISTS, "a: '${'"])
def test_interpolations_are_bounded_too(text):
    began = time.monotonic()
    with pytest.raises(Unreadable):
        parse_settings(text.encode())
    assert time.monotonic() - began < 5


def test_only_ordinary_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to wait for a writer would be for ever
    (tmp_path / "large").write_bytes(bytes(11))
    for name, says in (("pipe", "no file"), (".", "no file"), ("large", "larger than 10 bytes")):
        with pytest.raises(Unreadable, match=says):
            read_file(tmp_path / name, 10)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
