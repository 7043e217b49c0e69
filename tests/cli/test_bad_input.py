"""Every mistake a user can make costs one line that says what is wrong, where, and what
to do; exit code 2; and leaves nothing half-written."""

import re
import shutil
from pathlib import Path

import jax
import pytest

from maxlm.checkpoint.folder import FolderTier
from maxlm.config.load import load_config
from maxlm.config.show import to_yaml
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.run.config import RunConfig
from maxlm.run.setup import set_up_run
from tests.train import tiny

NAMED = "tokenizer.path=tokenizer300"
MOE = "model.mlp=null model.moe={num_experts: 6, experts_per_token: 2, d_ff: 16}"
EXPERTS_ON_TENSOR = (
    "sharding.storage.expert=tensor sharding.storage.mlp=null "
    "sharding.compute.expert=tensor sharding.compute.mlp=null"
)
SHORT = {"$MOE": MOE, "$EXPERTS_ON_TENSOR": EXPERTS_ON_TENSOR}


def parse_table(text: str) -> dict[str, str]:
    """Parse rows of what is given, and below it, indented, the message."""
    for name, long in SHORT.items():
        text = text.replace(name, long)
    rows = re.findall(r"^(\S.*)\n((?:    .*\n)+)", text, re.MULTILINE)
    return {change: " ".join(message.split()) for change, message in rows}


# A config with one odd setting, and what `maxlm train` says to it. None of these needs
# any text.
REFUSED_AT_ONCE = parse_table("""
trian.steps=3
    command line: unknown key trian; did you mean train?
model.attention.num_kv_heads=3
    tiny.yaml:18, command line: model.attention: num_heads=4 is not a multiple of
    num_kv_heads=3; let every kv head serve as many query heads as the others
mesh.data=3
    mesh: data=3, fsdp=-1 needs a multiple of 3 devices, 8 here; set the axes so that their
    product is 8, or one of them to -1
$MOE mesh.expert=4
    layers.moe.down: expert=6 does not divide over expert=4; change the mesh to a divisor of
    6, or set 'expert' to null in sharding.storage and sharding.compute to keep it whole
$MOE mesh.tensor=2 $EXPERTS_ON_TENSOR
    sharding.compute.expert: experts are split over 'tensor', the tokens they serve are not;
    add tensor to sharding.compute.batch, or take it from this rule
model.moe={num_experts: 6, experts_per_token: 2, d_ff: 16}
    tiny.yaml:15: model: both mlp and moe; set one of them to null, or dense_layers above 0
mesh.context=4 data.seq_len=30
    data.seq_len: a sequence of 30 tokens does not divide over context=4
    (sharding.compute.seq); use a seq_len that is a multiple of 4, or a smaller mesh
mesh.stage=4 data.batch_size=12 train.micro_batches=6
    train.micro_batches: 6 is not a multiple of the 4 pipeline stages; set it to 8, or
    mesh.stage to a divisor of 6
data.seq_len=64
    command line, tiny.yaml:21: data.seq_len=64 is longer than model.max_seq_len=32; shorten
    the sequences, or raise the model's limit
tokenizer.vocab_size=305
    model.vocab_size: the tokenizer has 305 ids, model.vocab_size=304; set it to 305 or more,
    or train a smaller tokenizer
tokenizer.path=tokenizer999
    tokenizer999: no such folder; name a folder that `maxlm tokenizer train` wrote
data.sources.0.documents=[]
    command line: data.sources.0: give either documents or a store
data.sources=[{name: a, store: store}]
    tokenizer.path: a store was made with a tokenizer, and none is named; name the folder of
    the tokenizer the stores were built with
data.sources.0.documents=[bad.txt]
    bad.txt: byte 0xff at offset 7 is not valid UTF-8; set on_bad_bytes
    (data.sources.N.on_bad_bytes of a run, --on-bad-bytes of maxlm corpus build) to "replace",
    or convert the text to UTF-8
--resume untrained
    untrained/checkpoints: no checkpoints here; name a run that has saved one
--resume trained model.d_model=48 model.mlp.d_ff=32
    .../trained/checkpoints: the checkpoint was written with another config: model.d_model=32
    became 48, model.mlp.d_ff=64 became 32; set them back, or train in another run folder
name=untrained tokenizer.vocab_size=290
    .../untrained: the text here was prepared with another config: tokenizer.vocab_size=300
    became 290; set them back, or train in another run folder
--num-processes 3
    --num-processes (MAXLM_NUM_PROCESSES) is 3, but --coordinator (MAXLM_COORDINATOR) and
    --process-id (MAXLM_PROCESS_ID) not set; set all three, or none
data.sources.0.documents=[python-package:nupmy]
    python-package:nupmy: no package 'nupmy' is installed in this Python's environment; install
    it, or name another that is imported so, such as python-package:numpy
folder=tiny.yaml/runs
    tiny.yaml/runs/tiny: cannot write the run folder (Not a directory); set folder=PATH to a
    place you may write to
""")
# The same for other verbs.
REFUSED_ELSEWHERE = parse_table("""
plan tiny.yaml --mesh fdsp=3
    --mesh: unknown mesh axis 'fdsp'; use stage, data, fsdp, expert, context, tensor
plan tiny.yaml model.num_layers=1000000000
    command line: model.num_layers must be less than or equal to 10000, not 1000000000
config show t5_small model.encoder_layers=10001
    command line: model.encoder_layers must be less than or equal to 10000, not 10001
generate nowhere x
    nowhere: no such folder; name a run's folder, such as runs/demo, or a Hugging Face checkpoint's
""")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with text, a tokenizer, a config, and runs of it: one with a
    checkpoint."""
    folder = tmp_path_factory.mktemp("home")
    text = tiny.write_text(folder / "text")
    tiny.write_config(folder, text)
    words = [path.read_bytes() for path in sorted(Path(text).iterdir())]
    train_tokenizer(TokenizerConfig(vocab_size=300), words).save(
        folder / "tokenizer300"
    )
    (folder / "short.txt").write_bytes(b"few words")
    (folder / "bad.txt").write_bytes(b"good\nba\xffd\n")
    for name in ("trained", "untrained"):
        config = load_config(RunConfig, folder / "tiny.yaml", [f"name={name}"]).value
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(to_yaml(config))
        if name == "trained":
            with FolderTier(folder / name / "checkpoints") as keeper:
                metadata = {
                    "config": config.model_dump(mode="json"),
                    "tokenizer": "unused",
                }
                keeper.save(
                    3,
                    set_up_run(config, jax.devices()[:1]).init_train_state(),
                    metadata,
                )
    return folder


@pytest.fixture(autouse=True)
def _in_home(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.mark.parametrize("settings", REFUSED_AT_ONCE)
def test_train_refuses_and_leaves_the_disk_as_it_was(home, check_refused, settings):
    # Values in braces hold spaces.
    parts = settings.replace(": ", ":\0").replace(", ", ",\0").split(" ")
    arguments = ["train", "tiny.yaml", *(part.replace("\0", " ") for part in parts)]
    check_refused(home, arguments, REFUSED_AT_ONCE[settings])


@pytest.mark.parametrize("command", REFUSED_ELSEWHERE)
def test_other_verbs(home, check_refused, command):
    check_refused(home, command.split(" "), REFUSED_ELSEWHERE[command])


def test_a_corpus_shorter_than_a_sequence(run, home):
    code, out, err = run(
        "train", "tiny.yaml", "data.sources.0.documents=[short.txt]", NAMED
    )
    assert (code, out) == (2, "")
    assert err.endswith(
        "error: store 'text': the corpus has 11 tokens, fewer than seq_len=32; give "
        "more text, or "
        "lower seq_len\n"
    )
    # What was prepared is whole, and no run was begun.
    assert {path.name for path in (home / "tiny").iterdir()} == {
        "config.yaml",
        "data",
        "tokenizer",
    }
    assert load_tokenizer(home / "tiny/tokenizer").vocab_size == 300
    assert [path.name for path in (home / "tiny/data/text").iterdir()] == ["all"]
    shutil.rmtree(home / "tiny")
