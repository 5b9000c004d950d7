"""Triton's interpreter (environment variable TRITON_INTERPRET=1), which runs kernels on the CPU in NumPy: made usable.

Two things of Triton 3.6 are replaced, neither of which the kernels see: ``__index__`` of a scalar (NumPy >= 2.4 refuses
``int`` of an array of one element), and the scan, which calls the combining function for each element: here for each
row along the axis, some hundred times faster.
"""

import numpy as np
from triton.runtime import interpreter

_original_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope) -> None:
    _original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _scan_rows(self, inputs):
    rows = [np.moveaxis(t.handle.data, self.axis, 0) for t in inputs]
    steps = [
        [self.to_tensor(r, t.dtype) for r, t in zip(step, inputs, strict=True)] for step in zip(*rows, strict=True)
    ]
    done = [steps[0]]
    for step in steps[1:]:
        done.append(self.combine_fn.fn(*done[-1], *step))
    columns = ([t.handle.data for t in column] for column in zip(*done, strict=True))
    return [
        self.to_tensor(np.moveaxis(np.stack(column), 0, self.axis), t.dtype)
        for column, t in zip(columns, inputs, strict=True)
    ]


interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.ScanOps.generic_scan = _scan_rows
