"""PyTorch outside and JAX inside: functions of tensors whose work is JAX's.

`function` takes any function of JAX, `hypergradient` a whole bilevel problem. Importing this
package needs torch.
"""

from bilevel_arrays.torch.report import Report
from bilevel_arrays.torch.wrapping import function, hypergradient

__all__ = ["Report", "function", "hypergradient"]
