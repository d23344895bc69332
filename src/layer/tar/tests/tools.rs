//! Archives of real tools.

use crate::layer::testing::{data_space, index, layout};

/// Real archives, made by the tar and python3 of this machine from a real tree, are what that tree is.
#[test]
fn archives_of_real_tools() {
    use std::os::unix::fs::{FileExt, MetadataExt, symlink};
    use std::process::Command;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("sub/deep")).unwrap();
    std::fs::write(root.join("sub/file"), b"content").unwrap();
    std::fs::hard_link(root.join("sub/file"), root.join("sub/deep/hard")).unwrap();
    symlink("../".repeat(60) + "etc/passwd", root.join("sub/link")).unwrap();
    std::fs::write(root.join("sub").join("n".repeat(140)), vec![3; 10_000]).unwrap();
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    for at in 0..12u64 {
        sparse.write_all_at(b"island", at << 17).unwrap();
    }
    sparse.set_len(2 << 20).unwrap();
    drop(sparse);
    let tar = |args: &[&str], out: &str| {
        let mut command = Command::new("tar");
        command
            .args(args)
            .arg("-cf")
            .arg(dir.path().join(out))
            .arg("-C")
            .arg(&root)
            .arg(".");
        command
    };
    let python = |format: &str, out: &str| {
        let mut command = Command::new("python3");
        let script = format!(
            "import sys, tarfile; tarfile.open(sys.argv[1], 'w', format=tarfile.{format}).add(sys.argv[2], '.')"
        );
        command.arg("-c").arg(script).arg(dir.path().join(out)).arg(&root);
        command
    };
    let mut tried = 0;
    for (out, mut command) in [
        ("gnu", tar(&["--format=gnu"], "gnu")),
        ("gnu-sparse", tar(&["--format=gnu", "--sparse"], "gnu-sparse")),
        ("pax", tar(&["--format=pax"], "pax")),
        (
            "sparse-0.0",
            tar(&["--format=pax", "--sparse-version=0.0"], "sparse-0.0"),
        ),
        (
            "sparse-0.1",
            tar(&["--format=pax", "--sparse-version=0.1"], "sparse-0.1"),
        ),
        (
            "sparse-1.0",
            tar(&["--format=pax", "--sparse-version=1.0"], "sparse-1.0"),
        ),
        ("python-gnu", python("GNU_FORMAT", "python-gnu")),
        ("python-pax", python("PAX_FORMAT", "python-pax")),
    ] {
        match command.status() {
            Ok(status) if status.success() => {}
            other => {
                eprintln!("SKIPPED: {out}: the tool gave {other:?}");
                continue;
            }
        }
        tried += 1;
        let bytes = std::fs::read(dir.path().join(out)).unwrap();
        let layout = layout(&bytes).unwrap_or_else(|error| panic!("{out}: {error}"));
        assert_eq!(layout.copies.is_empty(), !out.contains("sparse"), "{out}");
        let data = data_space(&bytes, &layout);
        let index = index(layout);
        let nanoseconds = out == "pax" || out.starts_with("sparse");
        let mut names = 0;
        let mut todo = vec![root.clone()];
        while let Some(path) = todo.pop() {
            names += 1;
            let real = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(&root).unwrap().as_os_str().as_encoded_bytes();
            let inode = index.inode(index.lookup_path(name).unwrap()).unwrap();
            if !name.is_empty() {
                assert_eq!(
                    (inode.mode, inode.uid, inode.gid),
                    (real.mode(), real.uid(), real.gid()),
                    "{out} {path:?}"
                );
            }
            assert_eq!(inode.mtime, real.mtime(), "{out} {path:?}");
            if nanoseconds {
                assert_eq!(i64::from(inode.mtime_nsec), real.mtime_nsec(), "{out} {path:?}");
            }
            if real.is_dir() {
                todo.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            } else if real.is_symlink() {
                assert_eq!(
                    index.target(inode),
                    std::fs::read_link(&path).unwrap().as_os_str().as_encoded_bytes()
                );
            } else {
                assert_eq!(u64::from(inode.nlink), real.nlink(), "{out} {path:?}");
                let bytes = &data[inode.data as usize..(inode.data + inode.size) as usize];
                assert!(bytes == std::fs::read(&path).unwrap(), "{out} {path:?}");
            }
        }
        assert_eq!(names, index.inodes().len() + 1, "{out}: one name is a hard link");
    }
    if tried == 0 {
        eprintln!("SKIPPED: neither tar nor python3 is here");
    }
}
