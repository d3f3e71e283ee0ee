"""Files as an attacker or a bad disk makes them: bytes mutated, cut, or fields forged."""

import copy
import json
import time

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

MANY = settings(
    max_examples=200,
    derandomize=True,
    phases=[Phase.generate],
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
FEW = settings(MANY, max_examples=30)
MAX_SECONDS = 10

_DEEP = "@deep@"
VALUES = st.sampled_from(
    [
        *(None, True, -1, 0, 1, 7, 2**31, 2**53, 10**12, 2**70, 10**400, 0.5, -0.0, 1e308, 1e-308),
        *(
            float("nan"),
            float("inf"),
            "",
            "x",
            "\ud800",
            "a\0b",
            "../../x",
            "/etc/passwd",
            "y" * 999,
        ),
        *([], {}, [[]], [1, "2"], {"x": {}}, ["x"] * 500, list(range(500)), _DEEP),
    ]
)


def nodes(content, path=()):
    """Yield the path of every value in JSON."""
    yield path
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from nodes(value, (*path, key))


@st.composite
def forged(draw, valid):
    """Draw text of JSON in which one to three values are others, missing or given twice."""
    content = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([*nodes(content)]))
        value = copy.deepcopy(draw(VALUES))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                content = value
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.integers(0, 9))
        if kind == 0:
            del parent[path[-1]]
        elif kind == 1 and isinstance(parent, dict):
            parent[f"{path[-1]}x"] = value
        else:
            parent[path[-1]] = value
    text = json.dumps(content)
    return text.replace(json.dumps(_DEEP), "[" * 5000 + "]" * 5000).encode()


@st.composite
def damaged(draw, valid):
    """Draw bytes of a file that are mutated, moved or cut."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.integers(0, 4))
        # Most of what matters is near the beginning or the end.
        last = max(len(content) - 1, 0)
        near = st.integers(0, min(last, 300)) | st.integers(max(last - 300, 0), last)
        at = draw(near | st.integers(0, last))
        if kind == 0:
            del content[at:]
        elif kind == 1 and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == 2 and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 3:
            del content[at : at + draw(st.integers(1, 50))]
        else:
            content[at:at] = draw(st.binary(min_size=1, max_size=20))
    return bytes(content)


def check(read, *names):
    """Call `read`: it succeeds, or raises what a command shows as one line, within 10 s of work.

    Args:
        read: Reads a file.
        names: One of them is in the message.
    """
    begin = time.process_time()
    try:
        read()
    except OSError:
        pass
    except ValueError as error:
        text = str(error)
        assert any(name in text for name in names), f"none of {names} in {text!r}"
        assert len(text) < 3000
    assert time.process_time() - begin < MAX_SECONDS
