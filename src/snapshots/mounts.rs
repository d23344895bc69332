//! The mounts that show a snapshot: one bind or overlay mount, with exactly the options that containerd's own overlay
//! snapshotter gives, because others parse them (BuildKit takes its fast way of comparing snapshots only if it knows
//! every option).

use std::path::{Path, PathBuf};

use crate::proto::types::Mount;
use crate::store::Kind;

/// Where overlayfs shows that it knows the option `index`.
const INDEX_PARAMETER: &str = "/sys/module/overlay/parameters/index";
/// The mapping of user ids of this process.
const UID_MAP: &str = "/proc/self/uid_map";
/// How the mapping of the initial user namespace reads: everything to itself.
const IDENTITY_MAP: [&str; 3] = ["0", "0", "4294967295"];

/// What overlayfs of this machine has to be told with every mount.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Overlay {
    /// Never use the index: one upper directory may be mounted, and lower directories shared, more than once.
    index_off: bool,
    /// Keep whiteouts and the like in `user.` attributes: the others cannot be written in a user namespace.
    user_xattr: bool,
}

impl Overlay {
    /// Looks at the kernel and at this process.
    pub fn detect() -> Self {
        Overlay {
            index_off: Path::new(INDEX_PARAMETER).exists(),
            user_xattr: std::fs::read_to_string(UID_MAP).is_ok_and(|map| !is_initial(&map)),
        }
    }

    /// The mounts of an active snapshot or a view, over `lowers`, topmost first.
    pub fn mounts(&self, kind: Kind, own: &Path, work: &Path, lowers: &[PathBuf]) -> Vec<Mount> {
        let writable = kind == Kind::Active;
        let mount = match lowers {
            [] => bind(own, writable),
            [lower] if !writable => bind(lower, false),
            _ => {
                let mut options = Vec::new();
                if self.index_off {
                    options.push("index=off".to_owned());
                }
                if self.user_xattr {
                    options.push("userxattr".to_owned());
                }
                if writable {
                    options.push(format!("workdir={}", work.display()));
                    options.push(format!("upperdir={}", own.display()));
                }
                // Without an upper directory overlayfs is read-only by itself; "ro" would be an option that BuildKit
                // does not know.
                let lowers: Vec<_> = lowers.iter().map(|lower| lower.to_string_lossy()).collect();
                options.push(format!("lowerdir={}", lowers.join(":")));
                mount("overlay", "overlay".to_owned(), options)
            }
        };
        vec![mount]
    }
}

fn bind(source: &Path, writable: bool) -> Mount {
    let access = if writable { "rw" } else { "ro" };
    mount(
        "bind",
        source.display().to_string(),
        vec![access.to_owned(), "rbind".to_owned()],
    )
}

fn mount(kind: &str, source: String, options: Vec<String>) -> Mount {
    Mount {
        r#type: kind.to_owned(),
        source,
        target: String::new(),
        options,
    }
}

/// Whether a `uid_map` is that of the initial user namespace.
fn is_initial(map: &str) -> bool {
    map.split_whitespace().eq(IDENTITY_MAP)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Overlay = Overlay {
        index_off: true,
        user_xattr: true,
    };

    fn options(overlay: Overlay, kind: Kind, lowers: &[&str]) -> (String, String, String) {
        let lowers: Vec<_> = lowers.iter().map(PathBuf::from).collect();
        let mounts = overlay.mounts(kind, Path::new("/r/9/fs"), Path::new("/r/9/work"), &lowers);
        let [mount] = mounts.as_slice() else {
            panic!("not one mount: {mounts:?}")
        };
        assert_eq!(mount.target, "");
        (mount.r#type.clone(), mount.source.clone(), mount.options.join(" "))
    }

    fn strings(a: &str, b: &str, c: &str) -> (String, String, String) {
        (a.to_owned(), b.to_owned(), c.to_owned())
    }

    #[test]
    fn one_directory_is_a_bind_mount() {
        assert_eq!(options(ALL, Kind::Active, &[]), strings("bind", "/r/9/fs", "rw rbind"));
        assert_eq!(options(ALL, Kind::View, &[]), strings("bind", "/r/9/fs", "ro rbind"));
        assert_eq!(
            options(ALL, Kind::View, &["/r/1/fs"]),
            strings("bind", "/r/1/fs", "ro rbind")
        );
    }

    #[test]
    fn several_directories_are_an_overlay() {
        assert_eq!(
            options(ALL, Kind::Active, &["/r/1/fs"]),
            strings(
                "overlay",
                "overlay",
                "index=off userxattr workdir=/r/9/work upperdir=/r/9/fs lowerdir=/r/1/fs"
            )
        );
        assert_eq!(
            options(Overlay::default(), Kind::View, &["/r/2/fs/.", "/r/1/fs"]),
            strings("overlay", "overlay", "lowerdir=/r/2/fs/.:/r/1/fs")
        );
    }

    #[test]
    fn only_another_user_namespace_needs_user_attributes() {
        assert!(is_initial("         0          0 4294967295\n"));
        assert!(!is_initial("         0       1000          1\n"));
        assert!(!is_initial("0 0 65536\n65536 65536 4294901759\n"));
    }
}
