"""Pictures of masks, caches, choices, quality, times, training, meshes: functions from numbers to a Figure.

`save` writes a figure. Colours are for the models, in their order, and can be told apart without red and green.
"""

from experiments.pictures import hypotheses
from experiments.pictures.canvas import save
from experiments.pictures.meshes import meshes
from experiments.pictures.quality import against_budget, against_keys
from experiments.pictures.reads import caches, choices, layers_of_query, masks, one_query
from experiments.pictures.times import against_length, throughput
from experiments.pictures.training import losses

__all__ = ["against_budget", "against_keys", "against_length", "caches", "choices", "hypotheses", "layers_of_query",
           "losses", "masks", "meshes", "one_query", "save", "throughput"]
