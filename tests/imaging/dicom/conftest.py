"""What the tests of DICOM share: the real series."""

from tests.cohort.conftest import real_data

__all__ = ["real_data"]
