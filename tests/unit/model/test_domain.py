import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model.domain import RestoredDisk, path_below, rebuild_domain

ROOT = "/restore/here"
VDA = {"vda": RestoredDisk(f"{ROOT}/disk 0.qcow2", "qcow2")}
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"


def rebuild(domain, disks=VDA, **options):
    options = {"name": "copy", "allowed_roots": [ROOT], **options}
    return rebuild_domain(domain, disks=disks, **options)


def with_devices(devices, kind="kvm"):
    return xmldoc.parse(
        f"<domain type='{kind}'><name>n</name><memory>1</memory><os><type>hvm</type></os>"
        f"<devices>{devices}</devices></domain>"
    )


def test_a_rebuilt_domain_is_one_that_libvirt_accepts(domain, assert_libvirt):
    assert_libvirt(domain)

    rebuilt = rebuild(domain, nvram_path=f"{ROOT}/nvram.fd", uuid="11111111-2222-4333-8444-555555555555")

    assert_libvirt(rebuilt.element)


def test_what_makes_the_machine_is_kept(domain):
    new = rebuild(domain, nvram_path=f"{ROOT}/nvram.fd").element

    assert new.findtext("name") == "copy"
    assert new.find("uuid") is None
    assert (new.findtext("memory"), new.find("memory").get("unit")) == ("2048", "MiB")
    assert (new.findtext("vcpu"), dict(new.find("vcpu").attrib)) == ("2", {})
    assert new.find("os/type").get("machine") == "pc-q35-7.2"
    assert new.findtext("os/loader") == "/usr/share/OVMF/OVMF_CODE_4M.ms.fd"
    assert new.findtext("os/nvram") == f"{ROOT}/nvram.fd"
    assert new.find("features/smm").get("state") == "on"
    assert new.find("cpu/feature").get("name") == "vmx"
    assert new.find("devices/tpm/backend").get("version") == "2.0"
    assert new.find("devices/channel/target").get("name") == "org.qemu.guest_agent.0"
    assert len(new.findall("devices/controller")) == 4
    assert new.find("devices/interface/mac").get("address") == "52:54:00:12:34:56"
    assert new.find("devices/graphics").get("passwd") == "secret"
    assert new.findtext("devices/rng/backend") == "/dev/urandom"


def test_what_names_the_host_is_left_behind_and_told(domain):
    rebuilt = rebuild(domain)
    text = xmldoc.serialize(rebuilt.element)

    for gone in (
        "<emulator",
        "hostdev",
        "filesystem",
        "seclabel",
        "metadata",
        "hugepages",
        "cpuset",
        "vnet7",
    ):
        assert gone not in text
    for path in ("/srv/", "/dev/vg", "/var/lib", "/usr/bin", "/etc"):
        assert path not in text
    told = "\n".join(rebuilt.dropped)
    for what in ("metadata", "memoryBacking", "vcpu@cpuset: 0-3", "os/nvram", "on_crash", "hostdev: pci"):
        assert what in told
    assert "disk: vdb: not in the backup" in rebuilt.dropped
    assert "filesystem: mount" in rebuilt.dropped
    assert "on_crash" in rebuilt.dropped


def test_what_is_always_made_anew_is_not_told(domain):
    told = "\n".join(rebuild(domain).dropped)

    for what in ("emulator", "placement", "port", "disk/driver", "genid", "uuid"):
        assert what not in told


def test_a_copy_gets_a_new_generation_id_and_a_port_of_its_own(domain):
    new = rebuild(domain).element

    assert new.find("genid").text is None
    assert new.find("devices/graphics").get("port") is None
    assert new.find("devices/graphics").get("autoport") == "yes"


def test_disks_get_their_new_paths_and_keep_what_the_guest_sees(domain):
    new = rebuild(
        domain, {**VDA, "vdb": RestoredDisk("/dev/vg/new", "raw")}, allowed_roots=[ROOT, "/dev/vg"]
    ).element
    vda, vdb, sda = new.findall("devices/disk")

    assert vda.find("source").get("file") == f"{ROOT}/disk 0.qcow2"
    assert dict(vda.find("driver").attrib) == {
        "name": "qemu",
        "type": "qcow2",
        "cache": "none",
        "io": "native",
        "discard": "unmap",
        "iothread": "1",
    }
    assert (vda.findtext("serial"), vda.find("address").get("bus")) == ("WEB-1", "0x04")
    assert (vdb.get("type"), vdb.find("source").get("dev"), vdb.find("driver").get("type")) == (
        "block",
        "/dev/vg/new",
        "raw",
    )
    assert (sda.get("device"), sda.find("source")) == ("cdrom", None)


def test_a_disk_that_is_nobody_s_is_an_error(domain):
    with pytest.raises(InvalidInput, match="no disk vdz"):
        rebuild(domain, {**VDA, "vdz": RestoredDisk(f"{ROOT}/z", "raw")})


@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow",
        f"{ROOT}/../../etc/shadow",
        f"{ROOT}x/disk",
        f"{ROOT}",
        f"{ROOT}/",
        f"{ROOT}//disk",
        f"{ROOT}/a\nb",
        "restore/here/disk",
        "",
        "//restore/here/disk",
    ],
)
def test_a_path_outside_the_allowed_roots_is_refused(domain, path):
    assert not path_below(path, [ROOT])
    with pytest.raises(InvalidInput, match="not under an allowed root"):
        rebuild(domain, {"vda": RestoredDisk(path, "raw")})
    if path:
        with pytest.raises(InvalidInput, match="NVRAM path"):
            rebuild(domain, nvram_path=path)


def test_root_itself_may_be_allowed():
    assert path_below("/a", ["/"])


@pytest.mark.parametrize("kind", ["", "raw,file=/x", "vmdk"])
def test_only_our_formats(domain, kind):
    with pytest.raises(InvalidInput, match="disk format"):
        rebuild(domain, {"vda": RestoredDisk(f"{ROOT}/a", kind)})


def test_interfaces_go_or_get_a_new_address(domain):
    without = rebuild(domain, no_nic=True)
    fresh = rebuild(domain, no_ip=True).element

    assert without.element.find("devices/interface") is None
    assert "interface" in without.dropped
    assert fresh.find("devices/interface/source").get("bridge") == "br0"
    assert fresh.find("devices/interface/mac") is None
    assert fresh.find("devices/interface/filterref").get("filter") == "clean-traffic"
    assert fresh.find("devices/interface/filterref/parameter") is None


def test_a_kernel_is_kept_only_from_an_allowed_place():
    text = (
        "<domain type='qemu'><os><type>hvm</type><kernel>{0}/vmlinuz</kernel><initrd>{0}/initrd</initrd>"
        "<cmdline>console=ttyS0 a=&quot;b&quot;</cmdline></os></domain>"
    )
    kept = rebuild(xmldoc.parse(text.format(ROOT)), {}).element
    gone = rebuild(xmldoc.parse(text.format("/boot")), {})

    assert kept.findtext("os/kernel") == f"{ROOT}/vmlinuz"
    assert kept.findtext("os/cmdline") == 'console=ttyS0 a="b"'
    assert [child.tag for child in gone.element.find("os")] == ["type"]
    assert "os/kernel: /boot/vmlinuz" in gone.dropped


def test_a_shared_firmware_is_never_writable_and_never_any_file():
    text = "<domain type='kvm'><os><loader readonly='no' type='pflash'>{}</loader></os></domain>"
    kept = rebuild(xmldoc.parse(text.format("/usr/share/OVMF/OVMF_CODE.fd")), {}).element
    gone = rebuild(xmldoc.parse(text.format("/usr/share/OVMF/../../../etc/shadow")), {})

    assert kept.find("os/loader").get("readonly") == "yes"
    assert gone.element.find("os/loader") is None


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\nb", "x" * 129])
def test_a_name_that_libvirt_refuses_is_refused_here(domain, name):
    with pytest.raises(InvalidInput):
        rebuild(domain, name=name)


@pytest.mark.parametrize("name", ['it\'s "x" & <y>', "名前", "-x", "a b"])
def test_any_other_name_will_do(domain, name, assert_libvirt):
    new = rebuild(domain, name=name).element

    assert xmldoc.parse(xmldoc.serialize(new)).findtext("name") == name
    assert_libvirt(new)


@pytest.mark.parametrize("text", ["<domain type='xen'/>", "<domain/>", "<network type='kvm'/>"])
def test_only_qemu_s_domains(text):
    with pytest.raises(InvalidInput, match="no QEMU domain"):
        rebuild(xmldoc.parse(text), {})


@pytest.mark.fault("security", "domain XML that reaches into the host")
@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("<serial type='file'><source path='/etc/cron.d/x'/><target port='0'/></serial>", "serial: file"),
        ("<serial type='pty'><log file='/etc/passwd'/><target port='0'/></serial>", "serial/log"),
        ("<console type='tcp'><source host='h' service='1'/></console>", "console: tcp"),
        ("<parallel type='file'><source path='/etc/x'/></parallel>", "parallel: file"),
        ("<channel type='file'><source path='/x'/><target type='virtio' name='a'/></channel>", "channel"),
        ("<rng model='virtio'><backend model='egd' type='tcp'/></rng>", "rng"),
        ("<rng model='virtio'><backend model='random'>/etc/shadow</backend></rng>", "rng: without backend"),
        (
            "<tpm><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
            "tpm: without backend",
        ),
        ("<input type='evdev'><source dev='/dev/input/event0'/></input>", "input: type='evdev'"),
        ("<input type='passthrough'><source evdev='/dev/x'/></input>", "input: type='passthrough'"),
        ("<interface type='vhostuser'><source type='unix' path='/x'/></interface>", "interface: vhostuser"),
        ("<interface type='ethernet'><script path='/bin/sh'/></interface>", "interface: ethernet"),
        ("<interface type='bridge'><source bridge='b'/><script path='/x'/></interface>", "interface/script"),
        ("<interface type='hostdev'/>", "interface: hostdev"),
        ("<graphics type='egl-headless'><gl rendernode='/dev/dri/x'/></graphics>", "graphics: type"),
        ("<graphics type='spice'><gl rendernode='/dev/dri/x'/></graphics>", "graphics/gl"),
        ("<graphics type='vnc' socket='/x'/>", "graphics@socket"),
        ("<graphics type='vnc'><listen type='socket' socket='/x'/></graphics>", "graphics/listen"),
        ("<video><driver name='vhostuser'/><model type='virtio'/></video>", "video/driver@name"),
        ("<video><model type='vga'/><acceleration rendernode='/dev/x'/></video>", "video/acceleration"),
        ("<watchdog model='itco' action='dump'/>", "watchdog: action='dump'"),
        ("<sound model='ac97'><audio id='1'/></sound>", "sound/audio"),
        ("<shmem name='x'/>", "shmem"),
        ("<redirdev bus='usb' type='spicevmc'/>", "redirdev: spicevmc"),
        ("<smartcard mode='host'/>", "smartcard"),
        ("<memory model='nvdimm'><source><path>/etc/x</path></source></memory>", "memory: nvdimm"),
        ("<vsock model='virtio'/>", "vsock: virtio"),
        ("<lease/>", "lease"),
        ("<emulator>/home/me/evil</emulator>", "emulator: /home/me/evil"),
        ("<audio id='1' type='file' path='/x'/>", "audio: type='file'"),
        ("<disk><target dev='vda'/><auth username='a'/></disk>", "disk/auth"),
        ("<disk><target dev='vda'/><encryption format='luks'/></disk>", "disk/encryption"),
        ("<disk><target dev='vda'/><shareable/></disk>", "disk/shareable"),
        (f"<q:x xmlns:q='{QEMU}'/>", "{http://libvirt.org"),
    ],
)
def test_a_device_that_reaches_into_the_host_does_not_come_through(device, told):
    rebuilt = rebuild(with_devices(device), VDA if "'vda'" in device else {})
    text = xmldoc.serialize(rebuilt.element).replace(VDA["vda"].path, "")

    assert any(line.startswith(told) for line in rebuilt.dropped), rebuilt.dropped
    assert "path=" not in text
    assert '="/' not in text
    assert ">/" not in text.replace("</", "")


@pytest.mark.fault("security", "domain XML that reaches into the host")
def test_the_command_line_of_qemu_is_never_passed_on():
    hostile = xmldoc.parse(
        f"<domain type='kvm' xmlns:qemu='{QEMU}'><qemu:commandline><qemu:arg value='-drive'/>"
        "</qemu:commandline><devices qemu:x='1'/></domain>"
    )
    text = xmldoc.serialize(rebuild(hostile, {}).element)

    assert "qemu" not in text
    assert "drive" not in text


def test_the_same_target_twice_gives_one_disk():
    twice = with_devices("<disk><target dev='vda'/></disk><disk device='cdrom'><target dev='vda'/></disk>")

    assert len(rebuild(twice).element.findall("devices/disk")) == 1


def test_what_is_told_stays_readable():
    many = with_devices("".join(f"<hostdev type='{'x' * 300}{n}'/><v{n}/>" for n in range(500)))

    dropped = rebuild(many, {}).dropped
    assert len(dropped) == 201
    assert dropped[-1] == "and 301 more"
    assert max(map(len, dropped)) <= 160


# Fuzzing: whatever the stored XML says, no path comes through that we did not name.


def _words(text):
    return st.sampled_from(text.split())


_EVIL = "/evil/marker"
_tags = _words(
    "name uuid memory os kernel initrd cmdline loader nvram type boot devices disk source target driver"
    " backingStore interface mac script serial console channel log input graphics listen gl video model"
    " acceleration tpm backend rng emulator hostdev filesystem seclabel metadata launchSecurity sysinfo"
    " entry controller sound audio memballoon watchdog shmem cpu feature features clock iotune address alias"
)
_attributes = _words(
    "type device dev file path name model bridge network mode value template socket host dir rendernode"
)
_values = _words(
    f"{_EVIL} {ROOT}/x file block pty unix disk cdrom virtio vnc spice random emulator vda yes pflash"
    " bridge network direct user smbios org.qemu.guest_agent.0"
)
_elements = st.recursive(
    st.builds(
        lambda tag, attributes, text: (tag, attributes, text, []),
        _tags,
        st.dictionaries(_attributes, _values, max_size=4),
        st.sampled_from([_EVIL, "", "hvm", "restart"]),
    ),
    lambda inner: st.builds(
        lambda tag, attributes, children: (tag, attributes, "", children),
        _tags,
        st.dictionaries(_attributes, _values, max_size=4),
        st.lists(inner, max_size=5),
    ),
    max_leaves=25,
)


def _element(plan):
    tag, attributes, text, children = plan
    element = etree.Element(tag, attributes)
    element.text = text
    element.extend([_element(child) for child in children])
    return element


#: texts that a guest sees and no program of the host opens
_FREE_TEXTS = {
    "title",
    "description",
    "entry",
    "model",
    "vendor",
    "product",
    "serial",
    "wwn",
    "type",
    "memory",
}


@pytest.mark.fault("security", "domain XML that reaches into the host")
@settings(max_examples=80)
@given(st.lists(_elements, max_size=8), st.lists(_elements, max_size=8))
def test_no_hostile_document_names_a_file_of_the_host(top, devices):
    hostile = etree.Element("domain", type="kvm")
    hostile.extend([_element(plan) for plan in top])
    section = etree.SubElement(hostile, "devices")
    section.extend([_element(plan) for plan in devices])

    new = rebuild(hostile, {}).element

    for element in new.iter():
        assert not any(str(value).startswith("/") for value in element.attrib.values())
        if (element.text or "").startswith("/") and element.tag not in _FREE_TEXTS:
            assert path_below(element.text, [ROOT]) or element.text == "/dev/urandom", element.tag
    assert not new.findall(".//source[@file]")
    assert {device.tag for device in new.find("devices")} <= {
        "disk", "interface", "serial", "console", "channel", "controller", "input", "graphics",
        "video", "audio", "memballoon", "watchdog", "sound", "rng", "tpm", "panic", "iommu",
    }  # fmt: skip
