"""How a report is read: by the standard library's parser alone."""

from html.parser import HTMLParser
from pathlib import Path

from click.testing import CliRunner

from carnet.cli import main

GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
MODEL = "model.safetensors"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Read(HTMLParser):
    """What a report holds."""

    VOID = ("meta", "br", "img")

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.open, self.tables, self.images = "", [], [], {}, []
        self._table = self._cell = None
        self.feed(path.read_text())

    def handle_starttag(self, tag, given):
        said = dict(given)
        self.tags.append((tag, said))
        if tag not in self.VOID:
            self.open.append(tag)
        match tag:
            case "table":
                self._table = self.tables.setdefault((said.get("class") or "").split()[-1] if said.get("class") else "", [])
            case "tr" if self._table is not None:
                self._table.append([])
            case "td" | "th" if self._table is not None:
                self._cell = ""
            case "data":
                self._value = said["value"]
            case _:
                pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}>"  # everything is closed in its order
        if tag in ("td", "th") and self._cell is not None:
            self._table[-1].append(self._cell.strip())
            self._cell = None
        if tag == "table":
            self._table = None

    def handle_startendtag(self, tag, given):
        self.tags.append((tag, dict(given)))
        if tag == "image":
            self.images.append(dict(given)["href"])

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self._cell is not None:
            self._cell += self._value if self.open[-1] == "data" else data

    def rows(self, table):
        """Return the rows of tables of a class, without their head; a number in one is exact."""
        return [
            row
            for row in self.tables.get(table, [])
            if row and "".join(row) and row[0] not in ("from", "what", "kind", "stored weight")
        ]


def call(*words):
    """Run the command in this process."""
    result = CliRunner().invoke(main, [str(word) for word in words], prog_name="carnet")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
