"""Ray's token authentication: a token for an own cluster, and what a given cluster asks for.

A process decides by RAY_AUTH_MODE whether it shows a token, and Ray guesses the mode from the
tokens that it finds, not from the cluster. Guessed wrong, a program is refused after 20 s as if no
cluster were there, or is let in and never hears of its actors. So the cluster is asked first.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import ray

from rlx.problems import refuse

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
ASK_S = 30.0
REFUSED = 41  # exit status of the question below
# In a process of its own: it takes the mode from its environment, and what Ray's C++ prints of a
# refusal, or of minutes without an answer, ends with it.
ASK = f"""
import sys, ray
from ray._private.services import canonicalize_bootstrap_address_or_die as found
try:
    ray._raylet.GcsClient(address=found(sys.argv[1]))
except ray.exceptions.AuthenticationError:
    sys.exit({REFUSED})
"""


def remember() -> Mapping[str, str | None]:
    """Returns what this process's environment says of tokens, for `put_back`."""
    return {key: os.environ.get(key) for key in (MODE, TOKEN)}


def put_back(before: Mapping[str, str | None]) -> None:
    """Sets the environment, and Ray in this process, as they were remembered."""
    if before != remember():
        _set(before)


def for_own_cluster() -> None:
    """Makes a token for a cluster that is about to start, unless the user has one or wants none.

    Ray would write one into the home folder, which may be read-only, and which runs that start at
    the same moment would write over each other's. This one is in the environment only.
    """
    if not _is_known() or _mode() not in (None, "token"):
        return
    made = {TOKEN: secrets.token_hex(32)} if _source() is None else {}
    _set({MODE: "token"} | made)


def for_given_cluster(address: str, setting: str, given: str) -> None:
    """Shows a token where the cluster at `address` asks for one, and none where it does not.

    address: host:port.  given: the setting's value, from which `address` was found.
    Raises ConfigError if no cluster answers there, if it asks for another token than is here, or if
    RAY_AUTH_MODE contradicts it.
    """
    if not _is_known() or _mode() not in (None, "token", "disabled"):
        return
    is_open = _lets_in(address, "disabled", setting, given)
    if _mode() is not None and is_open is (_mode() == "token"):
        asks = "asks for no token" if is_open else "asks for a token"
        says = f"the cluster there {asks}, but {MODE}={_mode()} is set here; unset it"
        raise refuse(setting, says, given=given)
    if not is_open:
        _check_token(address, setting, given)
    _set({MODE: "disabled" if is_open else "token"})


def _check_token(address: str, setting: str, given: str) -> None:
    source = _source()
    if source is None:
        says = f"the cluster there asks for a token, and there is none here; {_what_to_do()}"
        raise refuse(setting, says, given=given)
    if not _lets_in(address, "token", setting, given):
        says = f"the cluster there refused the token from {source}; {_what_to_do()}"
        raise refuse(setting, says, given=given)


def _what_to_do() -> str:
    return (
        f"set {TOKEN}, or write {_default_path()}, with what 'ray get-auth-token' prints where the "
        "cluster was started"
    )


def _lets_in(address: str, mode: str, setting: str, given: str) -> bool:
    """Says whether the cluster lets in a process of that mode.

    Raises ConfigError if nothing answers as a cluster: Ray itself would ask for minutes.
    """
    with suppress(subprocess.TimeoutExpired):
        asked = subprocess.run(
            [sys.executable, "-c", ASK, address],
            env=os.environ | {MODE: mode},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=ASK_S,
        )
        if asked.returncode in (0, REFUSED):
            return asked.returncode == 0
    says = f"no Ray cluster answers at {address}, asked for up to {ASK_S:.0f} s; start one with"
    raise refuse(setting, f"{says} 'ray start --head', or give null for an own", given=given)


def _is_known() -> bool:
    """Older releases of Ray have no tokens."""
    return hasattr(ray.exceptions, "AuthenticationError")


def _mode() -> str | None:
    given = os.environ.get(MODE)
    return None if given is None else given.lower()


def _source() -> str | None:
    """Names where Ray takes this user's token from, in its order; None if there is none."""
    if os.environ.get(TOKEN):
        return TOKEN
    if path := os.environ.get(TOKEN_PATH):
        if not _has_text(Path(path)):
            raise refuse(TOKEN_PATH, "no file with a token; write one or unset it", given=path)
        return TOKEN_PATH
    return str(_default_path()) if _has_text(_default_path()) else None


def _default_path() -> Path:
    return Path(os.path.expanduser("~/.ray/auth_token"))  # there may be no home


def _has_text(path: Path) -> bool:
    try:
        return bool(path.read_text().strip())
    except (OSError, UnicodeDecodeError):
        return False


def _set(values: Mapping[str, str | None]) -> None:
    """Sets (None: unsets) keys of the environment, which Ray read when it was imported."""
    for key, value in values.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
