from .claims import claims_page
from .measures import scaling
from .pictures import draw
from .size import StudySize
from .study import Study
from .wanted import Wanted

__all__ = ["Study", "StudySize", "Wanted", "claims_page", "draw", "scaling"]
