"""Pages are counted, shared by prefix and evicted as a naive model of them says."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from maxlm.inference.pages import PagePool, PrefixTree, count_spanned_pages

pytestmark = pytest.mark.heavy

SIZE, NUM_PAGES = 2, 14


class PagesMachine(RuleBasedStateMachine):
    """Sequences that grow, fork and end over small pools, beside dictionaries that say
    the same."""

    windows: tuple[int | None, ...] = (None, 3)

    def __init__(self):
        super().__init__()
        self.pools = [PagePool(NUM_PAGES) for _ in self.windows]
        self.tree = PrefixTree(self.pools, self.windows, SIZE)
        # dict(key, tokens, node, pages: a dict {index: page} for each group)
        self.sequences = []
        self.entries = {}  # (key, tokens) -> pages, 0 where there is none
        self.times = [
            {} for _ in self.windows
        ]  # page -> when its last sequence let it go
        self.clock = 0

    def count_holders(self, group, page):
        return sum(
            page in sequence["pages"][group].values() for sequence in self.sequences
        )

    def let_go(self, sequence, group, index):
        page = sequence["pages"][group].pop(index)
        self.pools[group].release(page)
        self.clock += 1
        if not self.count_holders(group, page):
            self.times[group][page] = self.clock

    def first_page(self, group, length):
        window = self.windows[group]
        return 0 if window is None else max(0, length - window + 1) // SIZE

    def is_usable(self, key, tokens, depth):
        """Whether all pages that the token behind so many pages sees are there."""
        return all(
            self.entries.get((key, tokens[: (index + 1) * SIZE]), [0, 0])[group]
            for group in range(len(self.windows))
            for index in range(self.first_page(group, depth * SIZE), depth)
        )

    def evict_page(self, group):
        """The naive rule: of the cached pages that no sequence holds, the one let go
        first."""
        cached = {
            pages[group]: at for at, pages in self.entries.items() if pages[group]
        }
        unused = [page for page in cached if not self.count_holders(group, page)]
        assert set(unused) == set(self.pools[group].evictable)
        if not unused:
            with pytest.raises(KeyError):
                self.tree.evict(group)
            return False
        victim = min(unused, key=self.times[group].__getitem__)
        self.tree.evict(group)
        if self.windows[group] is None:
            del self.entries[cached[victim]]
        else:
            self.entries[cached[victim]][group] = 0
        return True

    def allocate(self):
        """A page in every group, or none."""
        for group, pool in enumerate(self.pools):
            if not pool.free and not self.evict_page(group):
                return None
        return [pool.allocate() for pool in self.pools]

    @rule(
        key=st.sampled_from("ab"),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=11),
    )
    def start(self, key, tokens):
        nodes = self.tree.match(tokens, key)
        tokens = tuple(tokens)
        depths = range((len(tokens) - 1) // SIZE + 1)
        expected = max(depth for depth in depths if self.is_usable(key, tokens, depth))
        assert len(nodes) == expected
        node, pages = self.tree.acquire(nodes, key)
        held_pages = []
        for group, group_pages in enumerate(pages):
            seen = range(self.first_page(group, expected * SIZE), expected)
            held_pages.append(dict(zip(seen, group_pages, strict=True)))
            assert group_pages == [
                self.entries[key, tokens[: (i + 1) * SIZE]][group] for i in seen
            ]
        tokens = tokens[: expected * SIZE]
        self.sequences.append(
            {"key": key, "tokens": tokens, "node": node, "pages": held_pages}
        )

    @rule(which=st.integers(0, 99), tokens=st.tuples(*[st.integers(0, 1)] * SIZE))
    def grow(self, which, tokens):
        if not self.sequences:
            return
        new = self.allocate()
        if new is None:
            return
        sequence = self.sequences[which % len(self.sequences)]
        index = len(sequence["tokens"]) // SIZE
        sequence["tokens"] += tokens
        entry = self.entries.setdefault((sequence["key"], sequence["tokens"]), [0, 0])
        sequence["node"] = self.tree.extend(sequence["node"], tokens, new)
        for group, page in enumerate(new):
            entry[group] = entry[group] or page
            sequence["pages"][group][index] = entry[group]
            assert sequence["node"].pages[group] == entry[group]
            for behind in range(index):
                seen = behind >= self.first_page(group, len(sequence["tokens"]))
                if not seen and behind in sequence["pages"][group]:
                    self.let_go(sequence, group, behind)

    @rule(which=st.integers(0, 99))
    def fork(self, which):
        if self.sequences:
            source = self.sequences[which % len(self.sequences)]
            for pool, pages in zip(self.pools, source["pages"], strict=True):
                for page in pages.values():
                    pool.retain(page)
            source["node"].num_holders += 1
            self.sequences.append(
                {**source, "pages": [dict(group) for group in source["pages"]]}
            )

    @rule(which=st.integers(0, 99))
    def end(self, which):
        if self.sequences:
            sequence = self.sequences.pop(which % len(self.sequences))
            for group, pages in enumerate(sequence["pages"]):
                for index in sorted(pages, reverse=True):
                    self.let_go(sequence, group, index)
            self.tree.drop(sequence["node"])

    @rule(group=st.integers(0, 1))
    def evict(self, group):
        self.evict_page(group)

    @invariant()
    def counts_are_right(self):
        for group, pool in enumerate(self.pools):
            cached = [pages[group] for pages in self.entries.values() if pages[group]]
            assert len(cached) == len(set(cached)) == len(pool.cached)
            counts = [self.count_holders(group, page) for page in range(NUM_PAGES)]
            for page in cached:
                counts[page] += 1
            assert counts == pool.ref_counts
            assert len(pool.free) == counts[1:].count(0)
        nodes = {node for pool in self.pools for node in pool.cached.values()}
        assert len(nodes) == sum(any(pages) for pages in self.entries.values())

    def teardown(self):
        while self.sequences:
            self.end(0)
        for group, pool in enumerate(self.pools):
            while pool.evictable:
                self.tree.evict(group)
            assert len(pool.free) == NUM_PAGES - 1
        assert not self.tree._roots


class WindowedPagesMachine(PagesMachine):
    windows = (4, 3)


# 10,000 operations in total.
for machine in (PagesMachine, WindowedPagesMachine):
    machine.TestCase.settings = settings(max_examples=50, stateful_step_count=100)
TestPages = PagesMachine.TestCase
TestWindowedPages = WindowedPagesMachine.TestCase


@pytest.mark.parametrize("size", [1, 3, 16])
def test_spanned_pages(size):
    for tokens in range(40):
        starts = range(size)
        naive = max(
            len({(start + i) // size for i in range(tokens)}) for start in starts
        )
        assert count_spanned_pages(tokens, size) == naive
