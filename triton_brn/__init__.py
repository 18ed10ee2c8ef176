"""triton_brn: Batch Renormalization (Ioffe, 2017) for PyTorch, in fused Triton kernels."""

from pathlib import Path as _Path

_here = _Path(__file__).parent
if not (_here / "kernels" / "__init__.py").is_file() and (_here.parent / "pyproject.toml").is_file():
    # A plain checkout: triton_brn.kernels is the folder kernels/ beside this package.
    __path__.append(str(_here.parent))

from . import exported as _exported  # noqa: E402
from . import fusers as _fusers  # noqa: E402
from .activated import BatchRenormAct2d  # noqa: E402
from .convert import convert_batchnorm, revert_to_batchnorm  # noqa: E402
from .foreign import convert_batchrenorm  # noqa: E402
from .functional import batch_renorm  # noqa: E402
from .modules import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d  # noqa: E402
from .planner import forced_strategy  # noqa: E402
from .ramp import Limit, Ramp  # noqa: E402
from .tuning import tune  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormAct2d",
    "Limit",
    "Ramp",
    "__version__",
    "batch_renorm",
    "convert_batchnorm",
    "convert_batchrenorm",
    "forced_strategy",
    "revert_to_batchnorm",
    "tune",
]

_exported.register()
_fusers.register()
