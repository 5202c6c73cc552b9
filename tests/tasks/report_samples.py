"""What a report is made of in tests: a problem that describes its examples in several ways, one of them hostile."""

import numpy as np

from tasks.report import write_report
from tda.results import open_run
from tests.stored_run import write_run

HOSTILE = (
    "</style></script><script>document.title = 'taken'</script><img src=http://attacker.example/x onerror=\"document.title='taken'\">"
    "<svg onload=alert(1)><style>body{display:none}</style><base href=http://attacker.example/> {{ 7 * 7 }}"
)


class Shown:
    """A problem as far as a report needs one."""

    def __init__(self, describe):
        self.describe = describe


def images(split, i):
    return np.random.default_rng(i + (split == "query") * 1000).integers(0, 256, (8, 8), dtype=np.uint8)


def texts(split, i):
    return f"{split} text {i}: " + "word " * i


def hostile(split, i):
    return HOSTILE


def tables(split, i):
    return {"age": 20 + i, "name": HOSTILE, "picture": images(split, i)}


DESCRIPTIONS = {"images": images, "texts": texts, "hostile": hostile, "tables": tables}


def page_of(tmp_path, describe=images, *, queries=6, k=5, **manifest):
    write_run(tmp_path, **manifest)
    return write_report(open_run(tmp_path, incomplete=True), Shown(describe), queries=queries, k=k).decode()
