"""Pages of the key-value cache: who holds which, and which prefixes they hold."""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np


def count_spanned_pages(num_tokens: int, page_size: int) -> int:
    """Return the pages that consecutive tokens touch at most, wherever the first of
    them lies."""
    return (num_tokens + page_size - 2) // page_size + 1 if num_tokens else 0


class PagePool:
    """Page numbers of one group of layers, ``num_pages`` with page 0, which is never
    given out; and counts of who holds them.

    A page in a prefix tree is held once by the tree. When nobody else holds it, it is
    evictable: in order of when that came to be, the oldest first."""

    def __init__(self, num_pages: int):
        self.ref_counts = [0] * num_pages
        self.cached: dict[int, PrefixNode] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.free = list(range(num_pages - 1, 0, -1))

    @property
    def num_available(self) -> int:
        """Pages that are free or evictable."""
        return len(self.free) + len(self.evictable)

    def allocate(self) -> int:
        """Take a free page, held once."""
        page = self.free.pop()
        self.ref_counts[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Hold a page once more."""
        self.ref_counts[page] += 1
        self.evictable.pop(page, None)

    def release(self, page: int) -> None:
        """Hold a page once less; the last holder frees it."""
        self.ref_counts[page] -= 1
        if not self.ref_counts[page]:
            self.free.append(page)
        elif self.ref_counts[page] == 1 and page in self.cached:
            self.evictable[page] = None

    def uncache_page(self, page: int) -> "PrefixNode":
        """Free an evictable page and return the node that held it."""
        del self.evictable[page]
        node = self.cached.pop(page)
        self.release(page)
        return node


@dataclass(eq=False, slots=True)
class PrefixNode:
    """One page of tokens behind those of its ancestors."""

    key: Hashable
    """Its tokens; a root's is the key of its tree."""
    parent: "PrefixNode | None"
    depth: int
    """Pages from the root to here."""
    pages: list[int]
    """A page for each group; 0: evicted, in groups with a window alone."""
    children: "dict[tuple[int, ...], PrefixNode]" = field(default_factory=dict)
    routes: list[np.ndarray] = field(default_factory=list, repr=False)
    """The experts [E, k] of each of its tokens, where the engine records them."""
    num_holders: int = 0
    """Sequences whose cached prefix ends here; the node stays while there are any."""


class PrefixTree:
    """A radix tree over token ids, a page of tokens a node, with the pages that hold
    their keys and values in each group of layers (Zheng et al. 2023, arXiv 2312.07104,
    §3).

    A sequence that has a node's page holds those of its ancestors as well, and releases
    the deepest first. So where layers see everything, the oldest evictable page always
    belongs to a leaf. Groups with a window may lose any page alone; a prefix then
    matches where the last window of tokens is there.

    Args:
        pools: one a group.
        windows: tokens that a token sees in each group, itself included; None: all
            before it.
        page_size: tokens a page.
    """

    def __init__(
        self, pools: list[PagePool], windows: tuple[int | None, ...], page_size: int
    ):
        self.pools = pools
        self.windows = windows
        self.page_size = page_size
        self._roots: dict[Hashable, PrefixNode] = {}

    def match(self, tokens: list[int], key: Hashable = None) -> list[PrefixNode]:
        """Return the nodes of the longest usable prefix that leaves a token to compute,
        in the tree of a key: other models or adapters have others."""
        node = self._roots.get(key)
        nodes = []
        size = self.page_size
        runs = [0] * len(self.windows)  # pages without a gap that end here
        num_usable = 0
        for end in range(size, len(tokens), size):
            node = node and node.children.get(tuple(tokens[end - size : end]))
            if node is None:
                break
            nodes.append(node)
            is_usable = True
            for group, page in enumerate(node.pages):
                runs[group] = runs[group] + 1 if page else 0
                num_seen = node.depth - self.find_first_page(group, end)
                if runs[group] < num_seen:
                    is_usable = False
            if is_usable:
                num_usable = node.depth
        return nodes[:num_usable]

    def find_first_page(self, group: int, num_computed: int) -> int:
        """Return the index, in a sequence, of the first page that its next token
        sees."""
        window = self.windows[group]
        if window is None:
            return 0
        first_token = max(0, num_computed - window + 1)
        return first_token // self.page_size

    def acquire(
        self, nodes: list[PrefixNode], key: Hashable = None
    ) -> tuple[PrefixNode, list[list[int]]]:
        """Hold the pages of the nodes that `match` returned, as far as the next token
        sees them. Return the last node (the root without any), to extend and at last to
        `drop`; and for each group its pages, from `find_first_page` on."""
        node = nodes[-1] if nodes else self._roots.get(key)
        if node is None:
            node = self._roots[key] = PrefixNode(key, None, 0, [0] * len(self.pools))
        node.num_holders += 1
        pages = []
        for group, pool in enumerate(self.pools):
            first = self.find_first_page(group, len(nodes) * self.page_size)
            seen_pages = [seen_node.pages[group] for seen_node in nodes[first:]]
            for page in seen_pages:
                pool.retain(page)
            pages.append(seen_pages)
        return node, pages

    def extend(
        self, node: PrefixNode, tokens: tuple[int, ...], pages: list[int]
    ) -> PrefixNode:
        """Insert a page of computed tokens behind a node that the caller holds, and
        return its node, which the caller now holds instead. Where the tree has these
        tokens, its pages replace the caller's, which are released. ``pages``: the
        caller's, one a group; 0: it has none, where there is a window."""
        child = node.children.get(tokens)
        if child is None:
            child = PrefixNode(tokens, node, node.depth + 1, [0] * len(pages))
            node.children[tokens] = child
        for group, (pool, page) in enumerate(zip(self.pools, pages, strict=True)):
            if not page:
                continue
            if not child.pages[group]:
                pool.retain(page)
                pool.cached[page] = child
                child.pages[group] = page
            elif child.pages[group] != page:
                pool.retain(child.pages[group])
                pool.release(page)
        child.num_holders += 1
        node.num_holders -= 1
        return child

    def drop(self, node: PrefixNode) -> None:
        """Let go of a node that `acquire` or `extend` returned."""
        node.num_holders -= 1
        self._prune(node)

    def evict(self, group: int) -> None:
        """Free the page of a group that has been evictable for longest; KeyError: none
        is."""
        page = next(iter(self.pools[group].evictable), 0)
        node = self.pools[group].uncache_page(page)
        node.pages[group] = 0
        if self.windows[group] is None:
            assert not node.children, "a page is evicted before those behind it"
            for pool, other in zip(self.pools, node.pages, strict=True):
                if other:
                    pool.uncache_page(other)
            node.pages = [0] * len(self.pools)
        self._prune(node)

    def clear(self) -> None:
        """Remove all nodes, which nobody holds, and let go of their pages: those that no
        sequence holds are free."""
        for pool in self.pools:
            for page in list(pool.cached):
                del pool.cached[page]
                pool.evictable.pop(page, None)
                pool.release(page)
        self._roots = {}

    def _prune(self, node: PrefixNode) -> None:
        """Remove a node that nothing needs, and those above it that were there for it
        alone."""
        while not (node.children or node.num_holders or any(node.pages)):
            if node.parent is None:
                del self._roots[node.key]
                return
            assert isinstance(node.key, tuple)  # a root's alone may be of another type
            del node.parent.children[node.key]
            node = node.parent
