"""The Triton kernels. Imported only where they are dispatched to."""

from typing import Any

import triton


def _mend_interpreter() -> None:
    """Triton 3.6 makes an int of an array of one member, which numpy refuses from 2.4 on; later ones do it as here."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if triton.knobs.runtime.interpret:
    _mend_interpreter()
