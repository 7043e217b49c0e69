"""One data shard's rows, page tables and pools."""

from bisect import insort
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.pages import PagePool, PrefixNode, PrefixTree, count_spanned_pages
from maxlm.inference.sequences import PageCopy, RunningSequence


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
        self.tokens_left, self.chunks_left = (
            self.config.prefill_tokens,
            self.config.max_chunks,
        )

    def spend(self, num_tokens: int) -> None:
        """Take a chunk, or an encoder's input, from what the step may still prefill."""
        self.tokens_left, self.chunks_left = (
            self.tokens_left - num_tokens,
            self.chunks_left - 1,
        )

    def match_prefix(self, sequence: RunningSequence) -> list[PrefixNode]:
        """Return the nodes of the prefix that a sequence need not compute."""
        tokens = sequence.tokens[: self._count_matchable(sequence)]
        return self.tree.match(tokens, sequence.cache_key)

    def is_computing_prefix(self, sequence: RunningSequence) -> bool:
        """Return whether a running sequence is computing more of this one's prefix than
        the tree has, in whole pages."""
        most = self._count_matchable(sequence)
        size = self.page_size
        start = len(self.match_prefix(sequence)) * self.page_size
        for other in self.running:
            if other.num_to_compute > 1 and other.cache_key == sequence.cache_key:
                end = max(start, other.num_computed) // size * size + size
                if end < most and other.tokens[:end] == sequence.tokens[:end]:
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
            sequence.node, pages = self.tree.acquire(nodes, sequence.cache_key)
            for table, held in zip(self.page_tables, pages, strict=True):
                table[sequence.row, len(nodes) - len(held) : len(nodes)] = held
        return True

    def _has_room(self, sequence: RunningSequence, nodes: list[PrefixNode]) -> bool:
        """Return whether a sequence, with a prefix in the tree, can start in this step
        and compute its tokens beside those that run, with a page to spare for each of
        them. Those before it have their pages by now, or have left it no tokens of this
        step."""
        if not self.free_rows:
            return False
        num_encoded, num_matched = len(sequence.encoder_tokens), len(nodes)
        if num_encoded or len(sequence.tokens) - num_matched * self.page_size > 1:
            # An encoder's input is not split: it may have a step's budget, and more,
            # for itself.
            fits = max(1, num_encoded) <= self.tokens_left
            if not self.chunks_left or not (
                fits or self.tokens_left == self.config.prefill_tokens
            ):
                return False
        if not self.running:
            return True  # with small chunks, if need be
        for group, (pool, window) in enumerate(
            zip(self.pools, self.windows, strict=True)
        ):
            first = self.tree.find_first_page(group, num_matched * self.page_size)
            matched = [node.pages[group] for node in nodes[first:]]
            wanted = -(-len(sequence.tokens) // self.page_size)
            if window is not None:
                seen = window - 1 + self.config.prefill_tokens
                wanted = min(wanted, count_spanned_pages(seen, self.page_size))
            wanted += sum(page in pool.evictable for page in matched) - len(matched)
            if wanted + len(self.running) > pool.num_available:
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
        for group, (pool, table) in enumerate(
            zip(self.pools, self.page_tables, strict=True)
        ):
            first = self.tree.find_first_page(group, num_computed)
            pages = table[source.row, first : target.num_pages]
            table[target.row, first : target.num_pages] = pages
            for page in pages.tolist():
                pool.retain(page)
        node = source.node
        if node is not None:
            while node.depth > num_computed // self.page_size:
                node = node.parent
                assert node is not None
            node.num_holders += 1
            target.node = node

    def can_fork(self, source: RunningSequence, num_computed: int) -> bool:
        """Return whether there is a row, a page to spare for each that runs, and all
        that the token behind a sequence's first ones sees."""
        if not self.free_rows or any(
            p.num_available <= len(self.running) for p in self.pools
        ):
            return False
        end = -(-num_computed // self.page_size)
        for group, table in enumerate(self.page_tables):
            first = self.tree.find_first_page(group, num_computed)
            if first < end and not table[source.row, first]:
                return False
        return True

    def reserve(
        self, sequence: RunningSequence, num_tokens: int, copies: list[PageCopy]
    ) -> int:
        """Give a sequence pages of its own for its next tokens, as far as there are;
        ``copies`` gets those that a shared, partly filled page needs. Return the tokens
        that it has pages for, ``num_tokens`` at most; 0: nothing has changed."""
        row, computed, size = sequence.row, sequence.num_computed, self.page_size
        page, offset = divmod(computed, size)
        pools = list(zip(self.pools, self.page_tables, strict=True))
        shared = [
            bool(offset) and pool.ref_counts[t[row, page]] > 1 for pool, t in pools
        ]
        spare = [pool.num_available for pool in self.pools]
        num_new = min(map(int.__sub__, spare, shared), default=num_tokens)
        num_tokens = min(num_tokens, (sequence.num_pages + num_new) * size - computed)
        if num_new < 0 or num_tokens <= 0:
            return 0
        end = max(-(-(computed + num_tokens) // size), sequence.num_pages)
        for group, (pool, table) in enumerate(pools):
            if shared[group]:
                held = int(table[row, page])
                own = self._allocate(group)
                # All copies are read first: a copy of a copy is one of the first page.
                at = (self.shard, group, held)
                sources = (
                    c.source for c in copies if (c.shard, c.group, c.destination) == at
                )
                copies.append(PageCopy(self.shard, group, next(sources, held), own))
                pool.release(held)
                table[row, page] = own
            for index in range(sequence.num_pages, end):
                table[row, index] = self._allocate(group)
        sequence.num_pages = end
        return num_tokens

    def settle(self, sequence: RunningSequence) -> None:
        """Put a sequence's newly filled pages into the tree; take back those beyond its
        computed tokens, and those that its next token does not see."""
        size, computed, tables = self.page_size, sequence.num_computed, self.page_tables
        while sequence.node is not None and sequence.node.depth < computed // size:
            at = sequence.row, sequence.node.depth
            tokens = tuple(sequence.tokens[at[1] * size : (at[1] + 1) * size])
            pages = [int(table[at]) for table in tables]
            sequence.node = self.tree.extend(sequence.node, tokens, pages)
            for table, page in zip(tables, sequence.node.pages, strict=True):
                table[at] = page
        end = -(-computed // size)
        for group in range(len(self.pools)):
            self._take_back(sequence, group, end, sequence.num_pages)
            self._take_back(
                sequence, group, 0, self.tree.find_first_page(group, computed)
            )
        sequence.num_pages = end

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

    def _take_row(self, sequence: RunningSequence) -> None:
        sequence.row = heappop(self.free_rows)
        sequence.shard = self.shard
        sequence.state = "running"
        insort(self.running, sequence, key=lambda each: each.order)

    def _allocate(self, group: int) -> int:
        if not self.pools[group].free:
            self.tree.evict(group)
        return self.pools[group].allocate()

    def _take_back(
        self, sequence: RunningSequence, group: int, start: int, end: int
    ) -> None:
        """Release pages of a range, the deepest first, as `PrefixTree` wants it."""
        entries = self.page_tables[group][sequence.row, start:end]
        for page in reversed(entries[entries > 0].tolist()):
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
