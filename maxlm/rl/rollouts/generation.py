"""The engine that draws rollouts with a run's own parameters."""

from jax.sharding import Mesh

from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.inference.engine import Engine
from maxlm.models.params import Params, drop_auxiliary
from maxlm.rl.environments.environment import Environment
from maxlm.rl.rollouts.config import RolloutConfig
from maxlm.rl.rollouts.sampler import (
    RolloutSampler,
    find_max_length,
    find_max_prompt_length,
)
from maxlm.rl.rollouts.task import RolloutTask
from maxlm.rl.routes import ROUTES
from maxlm.run.placement import place_run
from maxlm.run.setup import RunSetup
from maxlm.sharding import MeshConfig, make_mesh
from maxlm.sharding.mesh import fold_for_generation


class PolicyEngine:
    """Generates with the parameters of a run, on the devices that train them.

    Args:
        max_tokens: of a sample, prompt and answer.

    Attributes:
        max_prompt_length: tokens of a prompt at most.

    Raises:
        MaxlmError: settings that leave no room for answers.
    """

    def __init__(
        self,
        task: RolloutTask,
        setup: RunSetup,
        tokenizer: Tokenizer,
        max_tokens: int,
    ):
        self._task = task
        self._setup = setup
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._config = task.engine
        if "max_length" not in task.engine.model_fields_set:
            self._config = task.engine.model_copy(update={"max_length": max_tokens})
        if ROUTES in setup.config.batch_arrays:
            self._config = self._config.model_copy(update={"record_routes": True})
        position_limit = setup.config.model.position_limit or max_tokens
        self.max_prompt_length = find_max_prompt_length(
            task.rollouts,
            min(max_tokens, position_limit, find_max_length(self._config)),
        )
        self._mesh = _make_generation_mesh(setup, task.generation_mesh)
        placed = place_run(
            setup.config,
            dict(self._mesh.shape),
            setup.model.dtype,
            for_training=False,
        )
        self._model = placed.model
        self._engine: Engine | None = None
        self._sampler: RolloutSampler | None = None

    def open_sampler(self, params: Params, step: int) -> RolloutSampler:
        """Returns the sampler, which from now on draws with ``params``: those that
        ``step`` begins with."""
        engine = self._open_engine(params)
        if self._sampler is None:
            self._sampler = self._make_sampler(
                engine, self._task.environment, self._task.rollouts, "rollout"
            )
        self._sampler.set_version(step)
        return self._sampler

    def open_other_sampler(
        self,
        params: Params,
        step: int,
        environment: Environment,
        config: RolloutConfig,
        stream: str,
    ) -> RolloutSampler:
        """Returns a sampler of another environment's prompts, which draws with
        ``params``: those that ``step`` begins with. Samples of the run that are under
        way wait meanwhile, and then compute anew what is there of them. ``stream``:
        tells its samples from those of the run."""
        engine = self._open_engine(params)
        if self._sampler is not None:
            self._sampler.pause()
        sampler = self._make_sampler(engine, environment, config, stream)
        sampler.set_version(step)
        return sampler

    def drop_sampler(self) -> None:
        """Gives up the samples of the run that are under way."""
        if self._sampler is not None:
            self._sampler.pause()
            self._sampler = None

    def _open_engine(self, params: Params) -> Engine:
        params = drop_auxiliary(params)
        if self._engine is None:
            self._engine = Engine(
                self._model,
                params,
                self._config,
                self._tokenizer,
                mesh=self._mesh,
            )
        else:
            self._engine.set_params(params)
        return self._engine

    def _make_sampler(
        self,
        engine: Engine,
        environment: Environment,
        config: RolloutConfig,
        stream: str,
    ) -> RolloutSampler:
        return RolloutSampler(
            engine,
            self._tokenizer,
            environment,
            config,
            seed=self._setup.config.seed,
            stream=stream,
            max_length=self._max_tokens,
        )

    def release(self) -> None:
        """Frees what generation alone needs; parameters that are shared are let go, so
        that a training step may take them. Samples that are under way keep their caches
        where ``rollouts.update_in_flight`` says so."""
        if self._engine is None:
            return
        self._engine.release_params()
        keeps_caches = self._task.rollouts.update_in_flight == "keep_caches"
        # A pause, such as for a validation, has left nothing in the caches to keep.
        if keeps_caches and self._engine.has_unfinished_requests:
            return
        if self._sampler is not None:
            self._sampler.pause()
        self._engine.release_caches()


def _make_generation_mesh(setup: RunSetup, config: MeshConfig | None) -> Mesh:
    """Returns the mesh to generate on: the run's own, or where that splits sequences or
    layers, which generation cannot, one of the same devices that splits the batch in
    their place."""
    devices = setup.mesh.devices.ravel().tolist()
    if config is not None:
        return make_mesh(config, devices)
    sizes = dict(setup.mesh.shape)
    folded = fold_for_generation(sizes)
    if folded == sizes:
        return setup.mesh
    return make_mesh(MeshConfig.model_validate(folded), devices)
