"""Which rollouts a run trains on, one after the other."""

from dataclasses import dataclass

from maxlm.checkpoint.skips import Skips, get_batch_index


@dataclass(frozen=True)
class RolloutHistory:
    """The rollouts of a run, but for those whose batches it skips.

    Batches r·U to r·U + U − 1 are of rollout r. A rollback skips those since the
    checkpoint that it goes back to, up to the end of a rollout.
    """

    batches_per_rollout: int
    skips: Skips

    def find_previous(self, number: int) -> int | None:
        """Returns the rollout that the run trained on before this one; None: it is the
        first."""
        batch = number * self.batches_per_rollout - 1
        for first, last in sorted(self.skips, reverse=True):
            if first <= batch <= last:
                batch = first - 1
        return batch // self.batches_per_rollout if batch >= 0 else None

    def count_skipped_before(self, number: int) -> int:
        """Returns how many rollouts lie between one and the one before it."""
        before = self.find_previous(number)
        return number - (-1 if before is None else before) - 1

    def is_after_skips(self, number: int) -> bool:
        """Whether the run skips a batch from the beginning of the rollout before to
        that of this one."""
        begin = (self.find_previous(number) or 0) * self.batches_per_rollout
        end = number * self.batches_per_rollout
        return any(first < end and last >= begin for first, last in self.skips)

    def find_needed_record(self, step: int) -> int | None:
        """Returns the rollout whose record a run begins with that goes on behind so
        many updates: the one that it stands in the middle of, or the one before, which
        says where its prompts stand; None: it begins."""
        batch = get_batch_index(step, self.skips)
        number, num_trained = divmod(batch, self.batches_per_rollout)
        return number if num_trained else self.find_previous(number)
