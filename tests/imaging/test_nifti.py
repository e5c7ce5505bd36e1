"""NIfTI in and out: what nibabel reads we read, what is damaged is refused, what identifies a patient stays behind."""

from __future__ import annotations

import errno
import gzip
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medmae.errors import InputError
from medmae.imaging.nifti import check_voxels, read_header, read_image, read_nifti, write_nifti
from medmae.imaging.volume import Volume

DATA = Path(__file__).parents[3] / "shared" / "data"
AFFINE = np.array([[-0.9, 0.1, 0, 30], [0.1, 0.88, -0.2, -40], [0, 0.2, 2.4, 12], [0, 0, 0, 1]])
SECRET = b"DOE^JANE 1961-02-03"


def values(shape=(9, 10, 11), dtype=np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2000, size=shape).astype(dtype)


def saved(path: Path, array: np.ndarray, affine=AFFINE, kind=nib.Nifti1Image, **fields) -> Path:
    """An image written by nibabel, with header ``fields`` overwritten afterwards in the file itself."""
    image = kind(array, affine)
    image.set_sform(affine, 1)
    nib.save(image, path)
    if fields:
        patch(path, **fields)
    return path


def patch(path: Path, **fields) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(raw, 1) if path.suffix == ".gz" else raw)


# --- reading what is right -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_voxels_and_affine_are_those_nibabel_reads(tmp_path, suffix, dtype):
    path = saved(tmp_path / f"a{suffix}", values(dtype=dtype) % 200)
    volume = read_nifti(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, nib.load(path).get_fdata())
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    assert read_header(path).grid == volume.grid and read_header(path).dtype == np.dtype(dtype).name


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_and_both_versions_are_read(tmp_path, order, kind):
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(np.int16).newbyteorder(order))
    image = kind(values(), AFFINE, header)
    nib.save(image, tmp_path / "a.nii.gz")
    assert nib.load(tmp_path / "a.nii.gz").header.endianness == order
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii.gz").array, values())


def test_scaling_is_applied_as_nibabel_does(tmp_path):
    path = saved(tmp_path / "a.nii.gz", values(), scl_slope=0.37, scl_inter=-1024.5)
    np.testing.assert_allclose(read_nifti(path).array, nib.load(path).get_fdata(), rtol=1e-6, atol=1e-4)
    assert read_header(path).scaled
    patch(path, scl_slope=0, scl_inter=7)  # a slope of 0 means: not scaled
    np.testing.assert_array_equal(read_nifti(path).array, values())


def test_four_axes_with_one_volume_are_three(tmp_path):
    path = saved(tmp_path / "a.nii.gz", values((4, 5, 6, 1)))
    assert read_nifti(path).shape == (4, 5, 6) == read_header(path).shape


def test_an_extension_before_the_voxels_is_skipped(tmp_path):
    image = nib.Nifti1Image(values(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 1000))
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii").array, values())


def test_a_file_in_several_gzip_members_is_whole(tmp_path):
    """bgzip and some archives write gzip in blocks: the length at the end is then only the last one's."""
    raw = gzip.decompress(saved(tmp_path / "a.nii.gz", values()).read_bytes())
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(raw[:700]) + gzip.compress(raw[700:]) + gzip.compress(b""))
    assert read_header(path).shape == (9, 10, 11)
    np.testing.assert_array_equal(read_nifti(path).array, values())


# --- where the image lies --------------------------------------------------------------------------------------------


def forms(path: Path, sform, qform, codes=(1, 1)) -> Path:
    image = nib.Nifti1Image(values(), None)
    image.set_sform(sform, codes[0])
    image.set_qform(qform, codes[1])
    nib.save(image, path)
    return path


def test_the_sform_holds_and_a_conflict_is_reported(tmp_path):
    sform, qform = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
    qform[0, 3] = 5
    problems = []
    volume = read_nifti(forms(tmp_path / "a.nii", sform, qform), problems)
    np.testing.assert_array_equal(volume.affine, sform)
    (problem,) = problems
    assert not problem.fatal and "disagree" in problem.what and "5.0 mm" in problem.found
    assert problem.where == str(tmp_path / "a.nii")
    assert [p.what for p in read_header(tmp_path / "a.nii").problems] == [problem.what]


def test_sforms_and_qforms_that_differ_by_rounding_are_no_conflict(tmp_path):
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) * 0.9, [1, 2, 3])
    problems = []
    read_nifti(forms(tmp_path / "a.nii", turn, turn, (1, 2)), problems)
    assert problems == []


def test_the_qform_serves_where_the_sform_is_not_coded_or_not_usable(tmp_path):
    qform = np.diag([-1.5, 1.5, 3, 1])
    problems = []
    volume = read_nifti(forms(tmp_path / "a.nii", np.eye(4), qform, (0, 1)), problems)
    np.testing.assert_allclose(volume.affine, qform)
    assert problems == []
    path = forms(tmp_path / "b.nii", np.diag([1.0, 1, 0, 1]), qform, (1, 1))
    np.testing.assert_allclose(read_nifti(path, problems).affine, qform)
    assert "sform is unusable" in problems[0].what


def test_an_unusable_qform_beside_a_good_sform_is_a_warning(tmp_path):
    path = forms(tmp_path / "a.nii", np.eye(4), np.eye(4))
    patch(path, quatern_b=3.0)  # not a rotation
    problems = []
    np.testing.assert_array_equal(read_nifti(path, problems).affine, np.eye(4))
    assert "qform is unusable" in problems[0].what


def test_without_any_form_voxel_sizes_serve_with_a_warning(tmp_path):
    path = forms(tmp_path / "a.nii", np.eye(4), np.diag([1.0, 2, 3, 1]), (0, 0))
    problems = []
    np.testing.assert_allclose(read_nifti(path, problems).affine, nib.load(path).affine)
    assert "does not say where" in problems[0].what


@pytest.mark.parametrize(("code", "factor"), [(1, 1000), (3, 0.001)])
def test_metres_and_micrometres_become_millimetres(tmp_path, code, factor):
    path = saved(tmp_path / "a.nii", values(), np.diag([1.5 / factor, 1.5 / factor, 3 / factor, 1]), xyzt_units=code)
    problems = []
    np.testing.assert_allclose(read_nifti(path, problems).spacing, (1.5, 1.5, 3), rtol=1e-6)
    assert "not in mm" in problems[0].what
    np.testing.assert_allclose(sitk.ReadImage(str(path)).GetSpacing(), (1.5, 1.5, 3), rtol=1e-6)  # as ITK does


@pytest.mark.parametrize("affine", [np.diag([1.0, 1, 0, 1]), np.diag([1.0, np.nan, 1, 1]), np.diag([1.0, 1, 900, 1])])
def test_an_impossible_place_names_file_and_field(tmp_path, affine):
    path = saved(tmp_path / "a.nii.gz", values(), np.eye(4))
    patch(path, srow_x=affine[0], srow_y=affine[1], srow_z=affine[2], qform_code=0)
    for read in (read_nifti, read_header):
        with pytest.raises(InputError) as caught:
            read(path)
        problem = caught.value.problem
        assert problem.where == str(path) and problem.field == "sform" and problem.found and problem.remedy


# --- files that are not what they seem -------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99, -1, -8, -9])
def test_a_truncated_gzip_is_found_from_the_header_alone_and_on_reading(tmp_path, keep):
    path = saved(tmp_path / "a.nii.gz", values((30, 30, 30)))
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if keep > 0 else keep])
    for read in (read_header, read_nifti):
        with pytest.raises(InputError, match="truncated") as caught:
            read(path)
        assert caught.value.problem.where == str(path) and caught.value.problem.remedy


def test_a_truncated_nii_is_found_from_the_header_alone_and_on_reading(tmp_path):
    path = saved(tmp_path / "a.nii", values())
    path.write_bytes(path.read_bytes()[:-1])
    for read in (read_header, read_nifti):
        with pytest.raises(InputError, match="voxels are missing"):
            read(path)


def test_voxels_that_changed_on_the_way_are_found_by_the_checksum(tmp_path):
    path = saved(tmp_path / "a.nii.gz", values((30, 30, 30)))
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 0xFF  # the checksum itself: the data unpack without complaint
    path.write_bytes(raw)
    with pytest.raises(InputError, match="damaged"):
        read_nifti(path)


def test_the_header_is_read_without_unpacking_the_voxels(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.nii.gz", np.zeros((200, 200, 200), np.int16))
    taken = []
    original = gzip.GzipFile.read

    def counting(self, size=-1):
        data = original(self, size)
        taken.append(len(data))
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    read_header(path)
    assert sum(taken) < 1000


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.nii.gz", b"the scan is on the other disk\n" * 50, "text"),
        ("a.nii", b"the scan is on the other disk\n" * 50, "text"),
        ("a.nii.gz", gzip.compress(b"subject,age\n" * 100), "text"),
        ("a.nii.gz", b"", "empty"),
        ("a.nii.gz", bytes(range(256)) * 8, "other data"),
        ("a.nii.gz", gzip.compress(b""), "empty"),
        ("a.nii.gz", b"\x1f\x8b", None),
    ],
    ids=["text .nii.gz", "text .nii", "packed text", "no bytes", "bytes", "nothing packed", "two bytes"],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path, name, content, found):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (read_header, read_nifti, read_image):
        with pytest.raises(InputError) as caught:
            read(path)
        assert caught.value.problem.where == str(path)
        assert found is None or found in caught.value.problem.found


def test_gzip_and_plain_files_under_each_others_names_are_refused_with_the_right_name(tmp_path):
    plain, packed = saved(tmp_path / "a.nii", values()), saved(tmp_path / "b.nii.gz", values())
    plain.rename(tmp_path / "c.nii.gz")
    packed.rename(tmp_path / "d.nii")
    with pytest.raises(InputError, match=r"Rename it to end in \.nii\."):
        read_nifti(tmp_path / "c.nii.gz")
    with pytest.raises(InputError, match=r"Rename it to end in \.nii\.gz"):
        read_nifti(tmp_path / "d.nii")


def test_a_missing_file_a_folder_and_another_format_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_nifti(tmp_path / "none.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    for path, found in ((tmp_path / "folder.nii.gz", "folder"), (tmp_path / "a.mha", ".mha")):
        with pytest.raises(InputError, match="not a NIfTI file") as caught:
            read_image(path)
        assert found in caught.value.problem.found


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"dim": [3, 9, 0, 11, 1, 1, 1, 1]}, "dim"),
        ({"dim": [3, 9, -10, 11, 1, 1, 1, 1]}, "dim"),
        ({"dim": [2, 9, 110, 1, 1, 1, 1, 1]}, "dim"),
        ({"dim": [0, 9, 10, 11, 1, 1, 1, 1]}, "dim"),
        ({"dim": [9, 9, 10, 11, 1, 1, 1, 1]}, "dim"),
        ({"dim": [4, 9, 10, 1, 11, 1, 1, 1]}, "dim"),
        ({"dim": [5, 9, 10, 1, 1, 11, 1, 1]}, "dim"),
        ({"datatype": 32}, "datatype"),  # complex
        ({"datatype": 128}, "datatype"),  # RGB
        ({"datatype": 1536}, "datatype"),  # 128-bit
        ({"datatype": 1}, "datatype"),  # single bits
        ({"datatype": 77}, "datatype"),
        ({"scl_slope": np.inf}, "scl_slope, scl_inter"),
        ({"scl_slope": 2, "scl_inter": np.nan}, "scl_slope, scl_inter"),
    ],
)
def test_headers_that_do_not_describe_one_3d_image_name_the_field(tmp_path, fields, field):
    path = saved(tmp_path / "a.nii.gz", values(), **fields)
    for read in (read_header, read_nifti):
        with pytest.raises(InputError) as caught:
            read(path)
        problem = caught.value.problem
        assert problem.where == str(path) and problem.field == field and problem.found and problem.remedy


def test_a_header_that_promises_more_than_any_memory_is_refused_quickly(tmp_path):
    path = saved(tmp_path / "a.nii.gz", values(), dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
    for read in (read_header, read_nifti):
        with pytest.raises(InputError, match="voxels are missing"):
            read(path)


def test_a_header_of_a_pair_or_of_analyze_is_refused(tmp_path):
    for kind, says in ((nib.Nifti1Pair, "another file"), (nib.AnalyzeImage, "not a NIfTI file")):
        nib.save(kind(values(), np.eye(4)), tmp_path / "a.hdr")
        (tmp_path / "a.hdr").rename(tmp_path / "a.nii")
        with pytest.raises(InputError, match=says):
            read_nifti(tmp_path / "a.nii")


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_never_ends_in_anything_but_a_clear_refusal(tmp_path, seed):
    rng = np.random.default_rng(seed)
    raw = bytearray(saved(tmp_path / "a.nii", values()).read_bytes())
    for _ in range(8):
        raw[rng.integers(0, 348)] = rng.integers(0, 256)
    path = tmp_path / ("a.nii" if seed % 2 else "b.nii.gz")
    path.write_bytes(raw if seed % 2 else gzip.compress(raw))
    for read in (read_header, read_nifti):
        try:
            read(path)
        except InputError as error:
            assert error.problem.where == str(path)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.__setitem__((0, 0, 0), np.nan), "not finite"),
        (lambda a: a.__setitem__((0, 0, slice(3)), -np.inf), "not finite"),
        (lambda a: a.fill(0), "every voxel is 0"),
        (lambda a: a.fill(3), "constant"),
    ],
)
def test_unusable_values_are_one_problem_with_found_and_remedy(change, says):
    array = values(dtype=np.float32)
    change(array)
    (problem,) = check_voxels(Volume(array, AFFINE), "sub-01/t1.nii.gz")
    assert says in problem.what and problem.where == "sub-01/t1.nii.gz"
    assert problem.field == "voxels" and problem.found and problem.remedy and problem.fatal


def test_good_values_are_no_problem():
    assert check_voxels(Volume(values(dtype=np.float32), AFFINE), "a") == []
    assert check_voxels(Volume(values() > 900, AFFINE), "a") == []


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_what_is_written_other_programs_read_at_the_same_place(tmp_path, suffix):
    path = tmp_path / "new" / f"a{suffix}"
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-0.9, 0.9, 2.5]), [1, 2, 3])
    array = values(dtype=np.float32)
    write_nifti(Volume(array, turn), path)
    image = nib.load(path)
    np.testing.assert_array_equal(image.get_fdata(), array)
    np.testing.assert_allclose(image.affine, turn, atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), turn, atol=1e-5)
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 2
    assert image.header.get_xyzt_units()[0] == "mm"
    itk = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).transpose(2, 1, 0), array)
    there = itk.TransformIndexToPhysicalPoint((3, 4, 5))
    np.testing.assert_allclose(np.array(there) * [-1, -1, 1], nib.affines.apply_affine(turn, [3, 4, 5]), atol=1e-4)
    back = read_nifti(path)
    np.testing.assert_array_equal(back.array, array)


def test_a_sheared_affine_is_kept_by_the_sform_alone(tmp_path):
    sheared = np.array([[1, 0, 0, 0], [0, 1, 1.2, 0], [0, 0, 3, 0], [0, 0, 0, 1.0]])
    write_nifti(Volume(values(), sheared), tmp_path / "a.nii.gz")
    image, problems = nib.load(tmp_path / "a.nii.gz"), []
    np.testing.assert_allclose(image.affine, sheared, atol=1e-6)
    assert int(image.header["qform_code"]) == 0
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii.gz", problems).affine, sheared, atol=1e-6)
    assert problems == []


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (np.bool_, None, np.uint8),
        (np.float16, None, np.float32),
        (np.float64, None, np.float32),
        (np.int64, None, np.int32),
        (np.int16, None, np.int16),
        (np.float32, np.int16, np.int16),
        (np.uint8, np.float32, np.float32),
    ],
)
def test_voxel_types(tmp_path, stored, asked, written):
    array = (values() % 2).astype(stored)
    write_nifti(Volume(array, AFFINE), tmp_path / "a.nii.gz", asked)
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == written
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), array.astype(written))


def test_integers_are_rounded_and_never_wrap_around(tmp_path):
    array = np.full((3, 3, 3), 2.6, np.float32)
    write_nifti(Volume(array, AFFINE), tmp_path / "a.nii.gz", np.uint8)
    assert read_nifti(tmp_path / "a.nii.gz").array.max() == 3
    for bad, kind in ((256, np.uint8), (-1, np.uint8), (40_000, np.int16), (np.nan, np.int16), (3e9, np.int32)):
        array[0, 0, 0] = bad
        with pytest.raises(InputError, match="do not fit"):
            write_nifti(Volume(array, AFFINE), tmp_path / "b.nii.gz", kind)
    assert os.listdir(tmp_path) == ["a.nii.gz"]


def test_a_result_can_take_over_the_forms_of_the_scan_it_belongs_to(tmp_path):
    scan = forms(tmp_path / "scan.nii.gz", nib.Nifti1Image(values(), AFFINE).affine, np.eye(4), (3, 1))
    volume = read_nifti(scan)
    write_nifti(volume, tmp_path / "a.nii.gz", like=scan)
    before, after = nib.load(scan).header, nib.load(tmp_path / "a.nii.gz").header
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "pixdim"):
        np.testing.assert_array_equal(after[field], before[field])
    elsewhere = Volume(volume.array, np.diag([1.0, 1, 2, 1]))  # on another grid: its own place counts
    write_nifti(elsewhere, tmp_path / "b.nii.gz", like=scan)
    np.testing.assert_array_equal(nib.load(tmp_path / "b.nii.gz").affine, elsewhere.affine)


def test_the_same_volume_gives_the_same_bytes(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(Volume(values(), AFFINE), tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_nifti(Volume(values(), AFFINE), path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="disk is full"):
        write_nifti(Volume(values() * 2, AFFINE), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.nii.gz"]


def test_a_name_without_a_nifti_suffix_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"\.nii or \.nii\.gz"):
        write_nifti(Volume(values(), AFFINE), tmp_path / "a.mha")


# --- patient data ----------------------------------------------------------------------------------------------------


def test_no_text_of_a_header_reaches_an_output_or_a_message(tmp_path):
    image = nib.Nifti1Image(values(), None)
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.diag([1.0, 1, 2, 1]), 1)
    for field, length in (("descrip", 80), ("aux_file", 24), ("db_name", 18), ("intent_name", 16)):
        image.header[field] = SECRET[: length - 1]
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", SECRET))
    scan = tmp_path / "scan.nii"
    nib.save(image, scan)
    assert scan.read_bytes().count(SECRET[:8]) == 5
    problems = []
    write_nifti(read_nifti(scan, problems), tmp_path / "out.nii", like=scan)
    assert SECRET[:8] not in (tmp_path / "out.nii").read_bytes()
    assert problems and SECRET[:8].decode() not in str(problems)
    raw = scan.read_bytes()
    for start, form, value in (
        (40, "<h", 9),
        (70, "<h", 32),
        (112, "<f", np.inf),
        (344, "4s", b"xxxx"),
        (280, "<f", np.nan),
    ):
        broken = bytearray(raw)
        struct.pack_into(form, broken, start, value)
        scan.write_bytes(broken)
        try:
            read_nifti(scan, problems)
        except InputError as error:
            problems.append(error.problem)
    assert len(problems) >= 5 and SECRET[:8].decode() not in str(problems)


# --- real scans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "isles22_stroke_0009/flair.nii.gz",
        "isles22_stroke_0009/adc.nii.gz",
        "ct/totalseg_example_ct.nii.gz",
        "brain_mr_open/oms-lg01/ses-1/t1.nii.gz",
    ],
)
def test_real_scans_read_as_nibabel_reads_them(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs the real scans ({name})")
    problems = []
    volume = read_nifti(path, problems)
    np.testing.assert_allclose(volume.array, nib.load(path).get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    assert problems == [] and check_voxels(volume, path) == [] and read_header(path).grid == volume.grid
