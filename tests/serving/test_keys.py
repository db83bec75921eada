from pathlib import Path

import pytest

from jaxserve.errors import ConfigError, UnauthenticatedError
from jaxserve.serving.keys import Keys
from jaxserve.serving.server_options import ServerOptions

ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789"


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    path = tmp_path / "keys"
    path.write_text(f"# who may call\n\nalice {ALICE}\nbob\t{BOB}\nbob another-key-of-bob\n")
    found = Keys.of(ServerOptions(api_key_file=path))
    assert found is not None
    return found


def test_a_key_names_its_caller(keys: Keys):
    assert keys.caller(f"Bearer {ALICE}").name == "alice"
    assert keys.caller(f"bearer {BOB}").name == "bob"
    assert keys.caller("Bearer another-key-of-bob").name == "bob"


def test_keys_share_no_cached_prompts_and_salts_do_not_tell_keys(keys: Keys):
    salts = {keys.caller(f"Bearer {key}").salt for key in (ALICE, BOB, "another-key-of-bob")}
    assert len(salts) == 3
    assert not any(ALICE in salt for salt in salts)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x", "Bearer \udcff"],
)
def test_anything_else_is_refused(keys: Keys, header: str | None):
    with pytest.raises(UnauthenticatedError) as caught:
        keys.caller(header)
    assert ALICE not in str(caught.value)


def test_no_file_asks_for_no_key():
    assert Keys.of(ServerOptions()) is None


@pytest.mark.parametrize("text", ["", "# none\n", "alice\n", "alice short\n", f"a {ALICE} b\n"])
def test_a_file_that_would_let_in_nobody_or_anybody_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match="API key file") as caught:
        Keys.read(path)
    assert "short" not in str(caught.value)


def test_a_missing_file_is_an_error_for_the_operator(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.read(tmp_path / "nowhere")
