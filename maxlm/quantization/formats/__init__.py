"""Number formats, by name.

A format says how matrices become codes and scales, and back. To add one, write a
:class:`~maxlm.quantization.formats.format.Format` in a file here and name it in
``FORMATS``, or register it from outside: an installed package names a function
``(the rest of the name) -> Format`` in an entry point of the group
``maxlm.weight_formats``.
"""
