//! What a test needs of the machine and may not find: one place that says so, where it can be counted, and that does not believe it.
//!
//! A test that cannot run calls [`skipped`] and returns. That writes one line, past the capture of the test runner, which `.ci/run` counts:
//! `skipped: TEST: it needs ABILITY: WHY`. It fails instead where the machine *has* the ability by signs that do not come from what the
//! test tried (version and configuration of the kernel), or where `LAZULI_REQUIRE` names it (words with commas between; `all`).

use std::fmt::Display;
use std::io::Write as _;

/// The variable with abilities that must not be missing.
pub const REQUIRE: &str = "LAZULI_REQUIRE";

/// What may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ability {
    /// EROFS that mounts files, and the right to mount.
    ErofsFiles,
    /// A tmpfs with attributes of users, and the right to mount.
    TmpfsUserXattrs,
    /// overlayfs that shows escaped marks.
    EscapedMarks,
    /// containerd 2.x.
    Containerd2,
    /// containerd 2.4 or later.
    Containerd24,
    /// `nerdctl`.
    Nerdctl,
    /// `buildkitd` and `buildctl`.
    Buildkit,
    /// A `fsck.erofs` that knows several devices.
    FsckErofs,
    /// `mkfs.xfs`, and the right to mount.
    Xfs,
    /// ext4 with quotas of projects: a kernel with `QFMT_V2`.
    Ext4ProjectQuotas,
    /// The same of xfs: `XFS_QUOTA`.
    XfsProjectQuotas,
}

impl Ability {
    fn word(self) -> &'static str {
        match self {
            Ability::ErofsFiles => "erofs-files",
            Ability::TmpfsUserXattrs => "tmpfs-user-xattrs",
            Ability::EscapedMarks => "escaped-marks",
            Ability::Containerd2 => "containerd2",
            Ability::Containerd24 => "containerd24",
            Ability::Nerdctl => "nerdctl",
            Ability::Buildkit => "buildkit",
            Ability::FsckErofs => "fsck-erofs",
            Ability::Xfs => "xfs",
            Ability::Ext4ProjectQuotas => "ext4-project-quotas",
            Ability::XfsProjectQuotas => "xfs-project-quotas",
        }
    }

    /// Whether the machine has it for certain, as far as that can be known without trying.
    fn is_certain(self) -> bool {
        match self {
            Ability::ErofsFiles => {
                may_mount() && is_kernel(6, 12) && has_file_system("erofs") && has_option("EROFS_FS_BACKED_BY_FILE")
            }
            Ability::TmpfsUserXattrs => may_mount() && is_kernel(6, 6) && has_option("TMPFS_XATTR"),
            Ability::EscapedMarks => may_mount() && is_kernel(6, 7) && has_file_system("overlay"),
            Ability::Ext4ProjectQuotas => may_mount() && has_file_system("ext4") && has_option("QFMT_V2"),
            Ability::XfsProjectQuotas => may_mount() && has_file_system("xfs") && has_option("XFS_QUOTA"),
            Ability::Containerd2
            | Ability::Containerd24
            | Ability::Nerdctl
            | Ability::Buildkit
            | Ability::FsckErofs
            | Ability::Xfs => false,
        }
    }
}

/// Says that a test does not run.
///
/// # Panics
/// Where it has to.
#[track_caller]
pub fn skipped(ability: Ability, why: impl Display) {
    let required = std::env::var(REQUIRE).unwrap_or_default();
    let word = ability.word();
    assert!(
        !required.split(',').any(|one| one.trim() == word || one.trim() == "all"),
        "{REQUIRE} wants {word}, and it is not there: {why}"
    );
    assert!(
        !ability.is_certain(),
        "this kernel has {word}, and a test does not find it: {why}"
    );
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("a test");
    // `eprintln` would be captured with what the test says.
    let _ = std::io::stderr().write_all(format!("\nskipped: {name}: it needs {word}: {why}\n").as_bytes());
}

fn may_mount() -> bool {
    // CAP_SYS_ADMIN is number 21.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|bits| bits & (1 << 21) != 0)
}

/// Whether the kernel is at least of this version.
pub fn is_kernel(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.trim().parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

/// Whether the kernel lists a file system; one whose module is not loaded is not listed.
fn has_file_system(name: &str) -> bool {
    let list = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    list.lines()
        .any(|line| line.split_whitespace().next_back() == Some(name))
}

/// Whether the kernel was built with an option, if it tells: distributions do not compress what they put into /boot.
fn has_option(name: &str) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let plain = std::fs::read_to_string(format!("/boot/config-{}", release.trim())).unwrap_or_else(|_| {
        let zcat = std::process::Command::new("zcat").arg("/proc/config.gz").output();
        zcat.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default()
    });
    plain.lines().any(|line| line == format!("CONFIG_{name}=y"))
}
