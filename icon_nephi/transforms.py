"""Maps and the networks that return them: what `icon_nephi.maps` has of them."""

from icon_nephi.maps.networks import AffinePair as AffinePair
from icon_nephi.maps.networks import FirstTransform as FirstTransform
from icon_nephi.maps.networks import FunctionFromNeuralField as FunctionFromNeuralField
from icon_nephi.maps.networks import NePhi as NePhi
from icon_nephi.maps.networks import TwoStepPair as TwoStepPair
from icon_nephi.maps.transforms import Composition as Composition
from icon_nephi.maps.transforms import MatrixTransform as MatrixTransform
from icon_nephi.maps.transforms import NeuralTransform as NeuralTransform
from icon_nephi.maps.transforms import value_and_jacobian as value_and_jacobian
