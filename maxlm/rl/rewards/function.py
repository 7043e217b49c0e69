"""A function of the user's own as a reward."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import field_validator

from maxlm.config import MaxlmError
from maxlm.rl.rewards.reward import Reward, Scorer
from maxlm.rl.samples import Sample


class FunctionReward(Reward):
    """The score that a Python function returns for a sample."""

    kind: str = "python"
    function: str
    """``package.module:function`` or ``path/to/file.py:function``; it takes a
    ``maxlm.rl.samples.Sample`` and returns one number, in a process of its own."""

    @field_validator("function")
    @classmethod
    def _check_function(cls, function: str) -> str:
        module, _, name = function.rpartition(":")
        is_path = module.endswith(".py")
        is_module = all(part.isidentifier() for part in module.split("."))
        if not (is_path or is_module) or not name.isidentifier():
            message = f"{function!r} names no function"
            fix = "write package.module:function or path/to/file.py:function"
            raise MaxlmError(message, where="function", fix=fix)
        return function

    def check_setup(self) -> None:
        module, _, name = self.function.rpartition(":")
        if module.endswith(".py") and not Path(module).is_file():
            message = "no such file"
            raise MaxlmError(message, where=module, fix="correct rewards.function")
        if not module.endswith(".py"):
            if not _is_module(module):
                message = f"no module named {module}"
                fix = "correct rewards.function, or set PYTHONPATH"
                raise MaxlmError(message, where=self.function, fix=fix)
            return
        # It is not run here; a name that stands nowhere in it is no function of it.
        text = Path(module).read_text(errors="replace")
        if name not in text and "import *" not in text:
            message = f"no function {name} there"
            raise MaxlmError(message, where=module, fix="correct rewards.function")

    def open(self) -> Scorer:
        return load_function(self.function)

    def score(self, sample: Sample) -> object:
        return self.open()(sample)


def _is_module(name: str) -> bool:
    """Whether a module can be imported, by its packages."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        # ValueError: __main__, which is no module of a file.
        return False


def load_function(source: str) -> Callable[[Sample], object]:
    """Returns a function of a module or file. Raises MaxlmError: there is none; whatever
    its module raises is raised."""
    path, _, name = source.rpartition(":")
    if path.endswith(".py"):
        module_name = f"maxlm_reward_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise MaxlmError("no Python file", where=path, fix="name another")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses and pickle look for a class's module by its name.
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            message = f"no module named {error.name}"
            fix = "correct rewards.function, or set PYTHONPATH"
            raise MaxlmError(message, where=source, fix=fix) from None
    function = getattr(module, name, None)
    if not callable(function):
        message = f"no function {name} there"
        raise MaxlmError(message, where=path, fix="correct rewards.function")
    return function
