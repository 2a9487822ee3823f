"""Names of the package that are imported when first asked for: `import bayeformers` itself loads no library."""

from .names import names_on_demand
from .registration import register_models

__all__ = ["names_on_demand", "register_models"]
