"""Checks names and docstrings: `python .ci/check_names.py [FOLDER ...]`; exit code 1 on
findings.

A public class name is unique in the tree. A public function begins with a verb, or is
two words or more that name the value it returns (`cross_entropy_loss`), or is the
field's own term. A docstring begins with a subject or a verb, not with "Of " or "What
", and its `Args:` are arguments.
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("maxlm", "pallas_kernels")
_VERBS = """
    abort accumulate add align all allocate append apply arrange assemble attend autotune await
    balance begin bind block broadcast build cache calibrate cast check choose chunk clean clear
    clip close
    collect combine compare compile compute concatenate configure convert copy corrupt count create
    cross cut declare decode decompress dedent dequantize describe detect detokenize dispatch divide
    download draw dump embed emit encode enter estimate evaluate exclude expand export extend
    extract fetch fill filter find finish fit flatten fold format freeze fuse gather generate get
    group grow handle
    hash ignore import infer init insert install interleave intersect invert iterate jit join keep
    kill label launch lay limit link list load locate lock log look lower make map mark mask match
    materialize measure merge mix move multiply name nest normalize number open order pack pad parse
    partition permute pick place plan pool precompute predict prefetch prefill prepare
    preprocess print process
    profile project prune put quantize raise rank read rebuild receive record reduce refuse register
    release remove rename render repeat replace report require reserve reset reshape reshard resolve
    restore resume retry reverse roll rotate round route run sample save scale scan scatter schedule
    score search seed select send separate serve set settle shard shift show shuffle shut simulate
    skip smoke sort split stack start step stop store stream strip submit sum summarize supports
    swap sweep take test tie time tokenize trace train transform transpose truncate try tune
    unflatten
    unpack unpermute unrotate unstack unwrap update upload use validate verify visit wait warn watch
    wrap write
    as can from has is needs to with
"""
_VALUES = """
    axes bytes config count dtype env factor flops fn hint info ids indices key keys kwargs layout
    length loss mask mesh name names norm offset offsets path pattern ranges rate ratio seconds
    sharding shardings shape shapes size sizes spec specs starts state table tokens type update
    backward forward gradient gradients kernel product
"""
"""Last words of functions that are named by the value they return, units included."""
_TERMS = """
    command main softmax attention flash_attention grouped_matmul logsumexp
    paged_attention cpu_matmul
    backward distributed_session einsum forward linear linear_cross_entropy matmul named_leaves
    outer sharded_attention truncated_normal
    beam_search best_of_n self_consistency diverse_verifier_tree_search
"""
"""Functions that the field knows by a noun."""
VERBS, VALUES, TERMS = (set(words.split()) for words in (_VERBS, _VALUES, _TERMS))


def main(folders: list[str]) -> int:
    classes = defaultdict(list)
    findings = []
    for path in sorted(
        path for name in PACKAGES for path in (ROOT / name).rglob("*.py")
    ):
        where = path.relative_to(ROOT)
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            line = getattr(node, "lineno", 1)
            docstring = ast.get_docstring(node) or ""
            if docstring.startswith(("Of ", "What ")):
                findings.append(f"{where}:{line}: the docstring begins with Of or What")
            for name in list_documented_args(docstring) - list_args(node):
                findings.append(
                    f"{where}:{line}: {name} under Args is no argument of {node.name}"
                )
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(f"{where}:{line}")
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                words = node.name.split("_")
                named = words[0] in VERBS or (len(words) > 1 and words[-1] in VALUES)
                if not named and node.name not in TERMS:
                    findings.append(
                        f"{where}:{node.lineno}: {node.name}() does not begin with a "
                        f"verb"
                    )
    for name, places in classes.items():
        findings += [
            f"{at}: class {name} has a namesake" for at in places if len(places) > 1
        ]
    findings = [
        each for each in findings if not folders or each.startswith(tuple(folders))
    ]
    print("\n".join(findings) or "names: no findings")
    return int(bool(findings))


def list_documented_args(docstring: str) -> set[str]:
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = (
        re.findall(r"^ {4}(\w+(?:, \w+)*):", section[1], re.MULTILINE)
        if section
        else []
    )
    return {name for entry in entries for name in entry.split(", ")}


def list_args(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> set[str]:
    """A class's are its `__init__`'s; without one, its fields, with those of its bases
    unknown."""
    if isinstance(node, ast.FunctionDef):
        return {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return list_args(each)
    return {
        ast.unparse(each.target)
        for each in node.body
        if isinstance(each, ast.AnnAssign)
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
