"""Networks by name: building and loading them, their preprocessing, taps on their layers, frozen teachers."""

from coursepack.models.build import Network as Network
from coursepack.models.build import build_network as build_network
from coursepack.models.load import load_teacher as load_teacher
from coursepack.models.preprocessing import Preprocessing as Preprocessing
from coursepack.models.taps import Tap as Tap
from coursepack.models.taps import parse_tap as parse_tap
from coursepack.models.teacher import TeacherOutput as TeacherOutput
from coursepack.models.teacher import TeacherRunner as TeacherRunner

__all__ = [
    "Network",
    "Preprocessing",
    "Tap",
    "TeacherOutput",
    "TeacherRunner",
    "build_network",
    "load_teacher",
    "parse_tap",
]
