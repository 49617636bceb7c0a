from .base import HeadLearner, Learner, Monitor, Task
from .ensemble import Ensemble
from .knn import KNN
from .soft import Soft
from .supervised import Supervised
from .target import TargetCompute

__all__ = [
    "KNN",
    "Ensemble",
    "HeadLearner",
    "Learner",
    "Monitor",
    "Soft",
    "Supervised",
    "TargetCompute",
    "Task",
]
