"""What a task's rollouts have the engine do, for the plan of a run."""

from maxlm.config import MaxlmError
from maxlm.rl.rollouts.sampler import find_max_prompt_length
from maxlm.rl.rollouts.task import RolloutTask
from maxlm.tasks.extra_work import GenerationWork


def count_groups_per_rollout(task: RolloutTask, seq_len: int, batch_size: int) -> int:
    """Returns the prompts of a rollout, for steps of ``batch_size`` rows of ``seq_len``.
    Raises MaxlmError: its samples do not divide into groups."""
    layout = task.make_layout(seq_len)
    num_samples = batch_size * task.minibatches * layout.sequences_per_row
    if num_samples % task.num_samples:
        message = (
            f"{num_samples} samples a rollout are no whole number of groups of "
            f"task.num_samples={task.num_samples}"
        )
        fix = "make data.batch_size · task.minibatches a multiple of it"
        raise MaxlmError(message, where="data.batch_size", fix=fix)
    return num_samples // task.num_samples


def describe_generation(
    task: RolloutTask, seq_len: int, batch_size: int
) -> GenerationWork:
    """Describes the rollouts for steps of ``batch_size`` rows of ``seq_len``: sequences
    as long as they may get. Raises MaxlmError: settings leave no room for answers, or a
    batch does not divide into groups of samples."""
    num_groups = count_groups_per_rollout(task, seq_len, batch_size)
    layout = task.make_layout(seq_len)
    engine = task.engine
    # As the engine is set up (rollouts/generation.py).
    longest = layout.max_entries + 1
    room = engine.max_length if "max_length" in engine.model_fields_set else longest
    max_prompt_length = find_max_prompt_length(task.rollouts, min(longest, room))
    return GenerationWork(
        num_sequences=num_groups * task.num_samples,
        max_prompt_tokens=max_prompt_length,
        max_new_tokens=task.rollouts.sampling.max_new_tokens,
        steps_per_rollout=task.epochs * task.minibatches,
        sequences_per_prompt=task.num_samples,
        max_sequences=engine.max_sequences,
        room_tokens=room,
        num_pages=engine.num_pages,
        page_size=engine.page_size,
        prefill_tokens=engine.prefill_tokens,
        cache=engine.cache,
        shares_params=engine.shares_params,
        # Of samples that are under way, where nothing is computed anew.
        keeps_caches=task.rollouts.staleness > 0
        and task.rollouts.update_in_flight == "keep_caches",
        mesh=task.generation_mesh,
    )
