from attnx.attention.api import UnsupportedError as UnsupportedError
from attnx.attention.api import attend as attend
from attnx.attention.api import attend_partial as attend_partial
from attnx.attention.api import choose as choose
from attnx.attention.explain import explain as explain
from attnx.attention.explain import explain_first as explain_first
from attnx.attention.jax_nn import dot_product_attention as dot_product_attention
from attnx.attention.spec import AttentionSpec as AttentionSpec
