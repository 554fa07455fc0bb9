"""Pages of the public interface, and links to them wherever a page says a public name.

The names are those in the tables of three pages: what the site documents is what these list.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

DOCS = Path(__file__).resolve().parents[1]
GENERATED = DOCS / "generated" / "api"
_ROW = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)
_PREFIXES = {
    "bl": "bilevel",
    "pde": "bilevel_pde",
    "bs": "bilevel_solvers",
    "testing": "bilevel.testing",
}
_LINKS = (nodes.reference, nodes.title, addnodes.pending_xref)
_TUTORIALS = (
    "first_hypergradient",
    "problem_and_solver",
    "jax_loop",
    "pytorch_loop",
    "published_code",
    "choice_of_estimator",
)


class Page(NamedTuple):
    """One page of the interface: its file, its title, and the full names on it."""

    file: str
    title: str
    names: list[str]


def _sections(file: str, start: str, mark: str) -> Iterator[tuple[str, str]]:
    text = (DOCS / file).read_text(encoding="utf-8").partition(start)[2]
    for section in re.split(rf"^{mark} ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        yield title.strip(), body


def _slug(title: str) -> str:
    return re.sub(r"\W+", "_", title.lower()).strip("_")


def pages() -> list[Page]:
    """Every page, with the names of its table in their order."""
    found: list[Page] = []
    for title, body in _sections("reference.md", "# The public names", "##"):
        names = [name for name in _ROW.findall(body) if not name.startswith("bilevel_")]
        found.append(Page(_slug(title), title, [f"bilevel.{name}" for name in names]))
    for title, body in _sections("pde.md", "## The public names", "###"):
        names = [f"bilevel_pde.{name}" for name in _ROW.findall(body)]
        found.append(Page(f"pde_{_slug(title)}", f"bilevel_pde: {title.lower()}", names))
    body = (DOCS / "solvers.md").read_text(encoding="utf-8").partition("## The public names")[2]
    names = [f"bilevel_solvers.{name}" for name in _ROW.findall(body)]
    found.append(Page("solvers", "bilevel_solvers: other people's solvers", names))
    return found


def full_names() -> dict[str, str]:
    """How a page may spell a public name, and the name in full."""
    spelled: dict[str, str] = {}
    for page in pages():
        for name in page.names:
            package, _, short = name.rpartition(".")
            spelled[name] = name
            spelled |= {f"{key}.{short}": name for key, of in _PREFIXES.items() if of == package}
            if package == "bilevel":
                spelled[short] = name
            else:
                spelled.setdefault(short, name)
    return spelled


def _directive(name: str) -> str:
    package, _, short = name.rpartition(".")
    thing = getattr(__import__(package, fromlist=[short]), short)
    if not isinstance(thing, type):
        return f".. autofunction:: {name}\n"
    # A solver or an estimator is made and handed over; who writes one reads the base class.
    made = any(base.__name__ in {"InnerSolver", "Estimator"} for base in thing.__mro__[1:])
    kind = "autoexception" if issubclass(thing, Exception) else "autoclass"
    return f".. {kind}:: {name}\n" + ("" if made else "   :members:\n")


def _write(path: Path, text: str) -> None:
    # Unchanged pages keep their time, so that a second build reads only what is new.
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_pages(app: Sphinx) -> None:
    """Write the sources of all pages below `generated/`."""
    del app
    GENERATED.mkdir(parents=True, exist_ok=True)
    for page in pages():
        title = f"{page.title}\n{'=' * len(page.title)}\n"
        body = "\n".join(_directive(name) for name in page.names)
        _write(GENERATED / f"{page.file}.rst", f"{title}\n{body}")
    listed = "\n".join(f"   {page.file}" for page in pages())
    _write(
        GENERATED / "index.rst",
        "The interface\n=============\n\n"
        "What docstrings say, a page for each table of :doc:`the public names </reference>`.\n\n"
        f".. toctree::\n   :maxdepth: 1\n\n{listed}\n",
    )


class PublicNames(SphinxTransform):
    """A public name set as code becomes a link to what it is."""

    default_priority = 400

    def apply(self, **kwargs: Any) -> None:
        """Replace the literals of a page."""
        del kwargs
        known: dict[str, str] = full_names()
        for literal in list(self.document.findall(nodes.literal)):
            target = known.get(literal.astext())
            if target is None or isinstance(literal.parent, _LINKS):
                continue
            elsewhere = self.env.docname not in {"pde", "solvers"}
            if target.startswith("bilevel_") and elsewhere and literal.astext().islower():
                continue  # there `optax` is a library, not the name that wraps it
            link = addnodes.pending_xref(
                "",
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refexplicit=True,
                refwarn=True,
                refdoc=self.env.docname,
            )
            literal.replace_self(link)
            link += literal


def resolve(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.Node | None:
    """Where an annotation names a class by the module it is defined in, its public name."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    public = full_names().get(target.rpartition(".")[2])
    if public is not None and target != public:
        domain = env.get_domain("py")
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)
    # What only annotations name has no page: types of other libraries, and of our own inside.
    return content if node.get("reftype") in {"class", "data", "obj"} else None


class ReadingOrder:
    """The order in a gallery: tutorials as they build on each other, everything else by name."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, name: str) -> tuple[int, str]:
        """The key to sort by."""
        stem = Path(name).stem
        return (_TUTORIALS.index(stem) if stem in _TUTORIALS else len(_TUTORIALS), stem)


def forget_compilations(conf: Any, name: str) -> None:
    """Between two of the files that a build runs: compiled programs are let go."""
    del conf, name
    jax.clear_caches()


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.connect("builder-inited", write_pages, priority=100)
    app.connect("missing-reference", resolve)
    app.add_transform(PublicNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
