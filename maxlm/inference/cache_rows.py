"""One data shard's rows, page tables and pools."""

from bisect import insort
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.pages import PagePool, PrefixNode, PrefixTree, count_spanned_pages
from maxlm.inference.sequences import PageCopy, RunningSequence, get_order


@dataclass(eq=False)
class CacheRows:
    """Rows and pages of one data shard: gives them to sequences and takes them back.

    Between steps a sequence's page tables hold the pages of its computed tokens that
    the next one sees, and 0 elsewhere."""

    shard: int
    """Its index."""
    config: EngineConfig
    windows: tuple[int | None, ...]
    """Windows of the groups of layers, as `PrefixTree` takes them."""
    page_tables: list[np.ndarray]
    """For each group int32 [rows, pages of the longest sequence], zeros at first."""

    def __post_init__(self) -> None:
        self.page_size = self.config.page_size
        self.pools = [
            PagePool(count) for count in self.config.count_pages(self.windows)
        ]
        self.tree = PrefixTree(self.pools, self.windows, self.page_size)
        self.free_rows = list(range(self.config.max_sequences))
        self.running: list[RunningSequence] = []
        """Sequences with a row, the oldest first."""
        self.row_copies: dict[int, int] = {}
        """Row to copy to before the next step, and the one to copy."""
        self.start_step()

    def start_step(self) -> None:
        """Allow a step's prefill again."""
        self.tokens_left = self.config.prefill_tokens
        self.chunks_left = self.config.max_chunks

    def spend(self, num_tokens: int) -> None:
        """Take a chunk, or an encoder's input, from what the step may still prefill."""
        self.tokens_left -= num_tokens
        self.chunks_left -= 1

    def match_prefix(self, sequence: RunningSequence) -> list[PrefixNode]:
        """Return the nodes of the prefix that a sequence need not compute."""
        ids = sequence.list_cache_ids(0, self._count_matchable(sequence))
        return self.tree.match(ids, sequence.prefix_key)

    def is_computing_prefix(self, sequence: RunningSequence) -> bool:
        """Return whether a running sequence is computing more of this one's prefix than
        the tree has, in whole pages."""
        num_matchable = self._count_matchable(sequence)
        page_size = self.page_size
        num_matched = len(self.match_prefix(sequence)) * page_size
        for other in self.running:
            if other.num_to_compute <= 1 or other.prefix_key != sequence.prefix_key:
                continue
            # The end of the next page that the other one fills.
            num_pages = max(num_matched, other.num_computed) // page_size
            end = (num_pages + 1) * page_size
            if end >= num_matchable:
                continue
            if other.list_cache_ids(0, end) == sequence.list_cache_ids(0, end):
                return True
        return False

    def place(self, sequence: RunningSequence) -> bool:
        """Give a sequence the lowest free row, and the pages of its prefix in the tree,
        if there is room for all of it."""
        nodes = self.match_prefix(sequence)
        if not self._has_room(sequence, nodes):
            return False
        self._take_row(sequence)
        sequence.num_computed = len(nodes) * self.page_size
        sequence.num_pages = len(nodes)
        if self.config.prefix_cache and not sequence.encoder_tokens:
            sequence.node, pages = self.tree.acquire(nodes, sequence.prefix_key)
            for table, seen_pages in zip(self.page_tables, pages, strict=True):
                first = len(nodes) - len(seen_pages)
                table[sequence.row, first : len(nodes)] = seen_pages
        cached_routes = [route for node in nodes for route in node.routes]
        sequence.routes += cached_routes[len(sequence.routes) :]
        return True

    def _has_room(self, sequence: RunningSequence, nodes: list[PrefixNode]) -> bool:
        """Return whether a sequence, with a prefix in the tree, can start in this step
        and compute its tokens beside those that run, with a page to spare for each of
        them. Those before it have their pages by now, or have left it no tokens of this
        step."""
        if not self.free_rows:
            return False
        page_size = self.page_size
        num_encoded = len(sequence.encoder_tokens)
        num_matched = len(nodes) * page_size
        num_to_compute = len(sequence.tokens) - num_matched
        if num_encoded or num_to_compute > 1:
            if not self.chunks_left:
                return False
            # An encoder's input is not split: it may have a step's budget, and more,
            # for itself.
            fits = max(1, num_encoded) <= self.tokens_left
            is_first = self.tokens_left == self.config.prefill_tokens
            if not (fits or is_first):
                return False
        if not self.running:
            return True  # with small chunks, if need be
        for group, pool in enumerate(self.pools):
            num_pages = -(-len(sequence.tokens) // page_size)
            window = self.windows[group]
            if window is not None:
                # A chunk's first token sees window - 1 tokens before it; pages before
                # those are given back after each chunk.
                num_seen = window - 1 + self.config.prefill_tokens
                num_pages = min(num_pages, count_spanned_pages(num_seen, page_size))

            # Matched pages are there already; taking an evictable one makes it
            # unavailable to others.
            first = self.tree.find_first_page(group, num_matched)
            matched_pages = [node.pages[group] for node in nodes[first:]]
            num_evictable = sum(page in pool.evictable for page in matched_pages)
            num_new_pages = num_pages - len(matched_pages)
            num_spare_pages = len(self.running)
            if num_new_pages + num_evictable + num_spare_pages > pool.num_available:
                return False
        return True

    def fork(
        self, source: RunningSequence, target: RunningSequence, num_computed: int
    ) -> None:
        """Give a sequence the lowest free row, a copy of another's, and hold the pages
        of its first tokens. Who first writes to the last of them, if it is partly
        filled, gets a copy."""
        self._take_row(target)
        # A copy of a copy that is not done yet is one of the first row.
        self.row_copies[target.row] = self.row_copies.get(source.row, source.row)
        target.has_encoder_output = source.has_encoder_output
        target.num_computed = num_computed
        target.num_pages = -(-num_computed // self.page_size)
        target.routes = source.routes[:num_computed]

        # Pages that the next token sees, shared with the source.
        for group, pool in enumerate(self.pools):
            table = self.page_tables[group]
            first = self.tree.find_first_page(group, num_computed)
            pages = table[source.row, first : target.num_pages]
            table[target.row, first : target.num_pages] = pages
            for page in pages.tolist():
                pool.retain(page)

        # The node of the last page that is full, or one above it.
        node = source.node
        if node is not None:
            num_full_pages = num_computed // self.page_size
            while node.depth > num_full_pages:
                node = node.parent
                assert node is not None
            node.num_holders += 1
            target.node = node

    def can_fork(self, source: RunningSequence, num_computed: int) -> bool:
        """Return whether there is a row, a page to spare for each that runs, and all
        that the token behind a sequence's first ones sees."""
        if not self.free_rows:
            return False
        if any(pool.num_available <= len(self.running) for pool in self.pools):
            return False
        num_pages = -(-num_computed // self.page_size)
        for group, table in enumerate(self.page_tables):
            first = self.tree.find_first_page(group, num_computed)
            # 0: the page left the source's window, and was given back.
            if first < num_pages and not table[source.row, first]:
                return False
        return True

    def reserve(
        self, sequence: RunningSequence, num_tokens: int, copies: list[PageCopy]
    ) -> int:
        """Give a sequence pages of its own for its next tokens, as far as there are;
        ``copies`` gets those that a shared, partly filled page needs. Return the tokens
        that it has pages for, ``num_tokens`` at most; 0: nothing has changed."""
        row = sequence.row
        page_size = self.page_size
        num_computed = sequence.num_computed

        # Where the next token goes: behind others in a page, if offset > 0.
        page_index, offset = divmod(num_computed, page_size)
        shared_groups: set[int] = set()
        # New pages that the pools of all groups have; at first as many as the tokens
        # need, or more.
        num_new_pages = num_tokens
        for group, pool in enumerate(self.pools):
            num_available = pool.num_available
            if offset > 0:
                page = self.page_tables[group][row, page_index]
                if pool.ref_counts[page] > 1:
                    shared_groups.add(group)
                    num_available -= 1  # for the copy of the shared page
            num_new_pages = min(num_new_pages, num_available)
        capacity = (sequence.num_pages + num_new_pages) * page_size
        num_tokens = min(num_tokens, capacity - num_computed)
        if num_new_pages < 0 or num_tokens <= 0:
            return 0

        # Nothing can fail from here on.
        num_pages = -(-(num_computed + num_tokens) // page_size)
        num_pages = max(num_pages, sequence.num_pages)
        for group, table in enumerate(self.page_tables):
            if group in shared_groups:
                page = int(table[row, page_index])
                table[row, page_index] = self._copy_page(group, page, copies)
            for index in range(sequence.num_pages, num_pages):
                table[row, index] = self._allocate(group)
        sequence.num_pages = num_pages
        return num_tokens

    def _copy_page(self, group: int, page: int, copies: list[PageCopy]) -> int:
        """Replace a shared page by a copy of it; return the copy's number."""
        copied = self._allocate(group)
        # All copies of a step are read before any is written: a copy of a copy that is
        # not done yet is one of the first page.
        source = page
        for copy in copies:
            if (copy.shard, copy.group, copy.destination) == (self.shard, group, page):
                source = copy.source
                break
        copies.append(PageCopy(self.shard, group, source, copied))
        self.pools[group].release(page)
        return copied

    def settle(self, sequence: RunningSequence) -> None:
        """Put a sequence's newly filled pages into the tree; take back those beyond its
        computed tokens, and those that its next token does not see."""
        row = sequence.row
        page_size = self.page_size
        num_computed = sequence.num_computed

        # Into the tree.
        node = sequence.node
        num_full_pages = num_computed // page_size
        while node is not None and node.depth < num_full_pages:
            index = node.depth  # of the first page that the tree does not have
            first_token = index * page_size
            ids = sequence.list_cache_ids(first_token, first_token + page_size)
            pages = [int(table[row, index]) for table in self.page_tables]
            node = self.tree.extend(node, tuple(ids), pages)
            if not node.routes:
                end = first_token + page_size
                node.routes = sequence.routes[first_token:end]
            # Where the tree had these tokens already, the pages are the tree's.
            for table, page in zip(self.page_tables, node.pages, strict=True):
                table[row, index] = page
        sequence.node = node

        # Back to the pools.
        num_pages = -(-num_computed // page_size)
        for group in range(len(self.pools)):
            first_seen = self.tree.find_first_page(group, num_computed)
            self._take_back(sequence, group, num_pages, sequence.num_pages)
            self._take_back(sequence, group, 0, first_seen)
        sequence.num_pages = num_pages

    def release(self, sequence: RunningSequence) -> None:
        """Take back a sequence's row and pages."""
        for group in range(len(self.pools)):
            self._take_back(sequence, group, 0, sequence.num_pages)
        if sequence.node is not None:
            self.tree.drop(sequence.node)
            sequence.node = None
        self.running.remove(sequence)
        heappush(self.free_rows, sequence.row)
        self.row_copies.pop(sequence.row, None)
        sequence.row = -1
        sequence.num_pages = 0
        sequence.num_computed = 0
        sequence.has_encoder_output = False

    def forget_prefixes(self) -> None:
        """Empty the prefix tree. Running sequences keep their pages, which no other
        will share."""
        for sequence in self.running:
            if sequence.node is not None:
                self.tree.drop(sequence.node)
                sequence.node = None
        self.tree.clear()

    def _take_row(self, sequence: RunningSequence) -> None:
        sequence.row = heappop(self.free_rows)
        sequence.shard = self.shard
        sequence.state = "running"
        insort(self.running, sequence, key=get_order)

    def _allocate(self, group: int) -> int:
        if not self.pools[group].free:
            self.tree.evict(group)
        return self.pools[group].allocate()

    def _take_back(
        self, sequence: RunningSequence, group: int, start: int, end: int
    ) -> None:
        """Release pages of a range, the deepest first, as `PrefixTree` wants it."""
        entries = self.page_tables[group][sequence.row, start:end]
        pages = entries[entries > 0].tolist()  # 0: no page
        for page in reversed(pages):
            self.pools[group].release(page)
        entries[:] = 0

    def _count_matchable(self, sequence: RunningSequence) -> int:
        """Return the tokens among which a sequence may begin with computed pages: none
        if an encoder's output is in them; only those before logits that are wanted."""
        if not self.config.prefix_cache or sequence.encoder_tokens:
            return 0
        if sequence.request.prompt_logprobs is None or sequence.num_output_tokens:
            return len(sequence.tokens)
        return sequence.logprobs_start
