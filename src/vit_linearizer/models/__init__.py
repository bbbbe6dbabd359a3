"""Students, teachers, and the adapter that turns any timm backbone into `Features`."""

from . import adventurer_sizes as adventurer_sizes  # registers the names with timm
from . import linear_vit_sizes as linear_vit_sizes  # likewise
