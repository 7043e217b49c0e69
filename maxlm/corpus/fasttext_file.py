"""Whether a file is a whole fastText classifier: its library hangs or crashes on one that is cut.

The layout is that of fastText's `FastText::loadModel` (format version 12): settings, dictionary,
input matrix (product-quantised in a `.ftz`), output matrix.
"""

import struct
from pathlib import Path

from maxlm.config import MaxlmError

_MAGIC, _VERSION, _SUPERVISED = 793712314, 12, 3


def check_model_file(path: Path) -> None:
    """Check that a `.ftz` or `.bin` file is as long as its parts say.

    Raises:
        MaxlmError: the file is missing, damaged, or another kind of model.
    """
    fix = "copy it again, or name a file like fastText's lid.176.ftz"
    try:
        data = path.read_bytes()
        is_whole = _find_end(data) == len(data)
    except OSError as error:
        what = f"cannot read the model: {error.strerror}"
        raise MaxlmError(what, where=str(path), fix=fix) from error
    except (ValueError, struct.error):
        is_whole = False
    if not is_whole:
        raise MaxlmError("no whole fastText classifier", where=str(path), fix=fix)


def _find_end(data: bytes) -> int:
    """The length that a file should have, in bytes.

    Raises:
        ValueError: another kind of file.
        ValueError, struct.error: the file ends before that can be told.
    """
    at = 0

    def read(form: str) -> tuple:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values

    def skip_quantizer() -> None:
        nonlocal at
        dim, *_ = read("4i")
        at += 4 * 256 * dim

    def skip_matrix(quantized: bool) -> None:
        nonlocal at
        if not quantized:
            rows, columns = read("2q")
            at += 4 * rows * columns
            return
        with_norms, rows, _, codes = read("?2qi")
        at += codes
        skip_quantizer()
        if with_norms:
            at += rows
            skip_quantizer()

    magic, version, *settings = read("14id")
    if (magic, version, settings[7]) != (_MAGIC, _VERSION, _SUPERVISED):
        raise ValueError("not a supervised fastText model of version 12")
    entries, _, _, _, pruned = read("3i2q")
    for _ in range(entries):
        at = data.index(b"\0", at) + 10  # A word, how often it occurs, whether it is a label.
    at += 8 * max(pruned, 0)
    (quantized,) = read("?")
    skip_matrix(quantized)
    (output_quantized,) = read("?")
    skip_matrix(quantized and output_quantized)
    return at
