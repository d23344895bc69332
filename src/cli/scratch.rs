//! Temporary directories of commands, which are gone when the command ends, however it ends.
//!
//! A command removes its own directory when everything that writes into it has ended (`work.rs`). Nothing helps against SIGKILL; so each
//! directory has a file `claim` that its process holds locked. The next command that needs a directory looks for those of dead processes,
//! takes their mounts away and removes them. (The kernel unlocks what a dead process has locked, whatever it died of.) A directory gets
//! the name under which it is looked for only once it is claimed, and nobody ever removes one that has no claim, or is another user's.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

use crate::sys::mount::{Unmount, unmount};
use crate::sys::mountinfo::mounts;

/// How the names of these directories begin.
const PREFIX: &str = "lazuli-scratch-";
/// How their names begin until they are claimed.
const UNCLAIMED: &str = ".lazuli-new-";
/// The file that is locked for as long as the process lives.
const CLAIM: &str = "claim";
/// Nobody else may look into them: FUSE is mounted below.
const PRIVATE: u32 = 0o700;
/// Times that a removal is tried: threads that end may still make or remove files.
const REMOVALS: u32 = 20;
/// Pause between two of them.
const PAUSE: Duration = Duration::from_millis(50);

/// A temporary directory of this process.
pub(super) struct Scratch {
    path: PathBuf,
    _claim: File,
}

impl Scratch {
    /// Makes one below `$TMPDIR`, and removes those that dead processes have left there.
    pub(super) fn new() -> anyhow::Result<Self> {
        let base = std::env::temp_dir();
        // As the kernel writes it in the list of mounts.
        let base = base.canonicalize().unwrap_or(base);
        clear(&base);
        Self::below(&base).with_context(|| format!("a temporary directory in {}", base.display()))
    }

    fn below(base: &Path) -> io::Result<Self> {
        let name = super::unique();
        let (new, path) = (
            base.join(format!("{UNCLAIMED}{name}")),
            base.join(format!("{PREFIX}{name}")),
        );
        DirBuilder::new().mode(PRIVATE).create(&new)?;
        let claimed = File::create(new.join(CLAIM)).and_then(|claim| {
            // On file systems that cannot lock, what a dead process left is found by nobody.
            let _ = claim.try_lock();
            fs::rename(&new, &path).map(|()| claim)
        });
        match claimed {
            Ok(claim) => Ok(Scratch { path, _claim: claim }),
            Err(error) => {
                // Nobody would find it.
                let _ = fs::remove_dir_all(&new);
                Err(error)
            }
        }
    }

    /// The directory: absolute, without symbolic links.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            super::output::tell(&format!("{} cannot be removed: {error}", self.path.display()));
        }
    }
}

/// Removes what dead processes have left in `base`. What cannot be removed stays for the next time.
fn clear(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let is_such = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if is_such
            && let Some(claim) = claim_of_dead(&entry.path())
            && let Err(error) = take_away(&entry.path())
        {
            super::output::tell(&format!(
                "{} was left by a lazuli that was killed, and cannot be removed: {error}",
                entry.path().display()
            ));
            drop(claim);
        }
    }
}

/// The lock of a directory of ours whose process is dead.
fn claim_of_dead(dir: &Path) -> Option<File> {
    let own = |path: &Path| {
        let metadata = path.symlink_metadata().ok()?;
        (metadata.uid() == rustix::process::geteuid().as_raw()).then_some(metadata)
    };
    own(dir).filter(fs::Metadata::is_dir)?;
    let path = dir.join(CLAIM);
    own(&path).filter(fs::Metadata::is_file)?;
    let claim = File::open(&path).ok()?;
    claim.try_lock().is_ok().then_some(claim)
}

/// Removes a directory with all that is mounted in it, and from it.
fn take_away(dir: &Path) -> io::Result<()> {
    let there = dir.canonicalize()?;
    let all = mounts().map_err(io::Error::other)?;
    // An image that is shown somewhere else says so in its source. The last one that was mounted is the uppermost.
    let left = all.iter().rev();
    let left = left.filter(|mount| mount.mount_point.starts_with(&there) || Path::new(&mount.source) == there);
    for mount in left {
        unmount(&mount.mount_point, Unmount::Detach).map_err(io::Error::other)?;
    }
    remove(&there)
}

fn remove(dir: &Path) -> io::Result<()> {
    let mut tries = 1;
    loop {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries < REMOVALS => {
                tries += 1;
                std::thread::sleep(PAUSE);
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn it_is_private_and_goes_with_its_owner() {
        let base = tempfile::tempdir().unwrap();
        let scratch = Scratch::below(base.path()).unwrap();
        let mode = fs::metadata(scratch.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, PRIVATE);
        fs::write(scratch.path().join("data"), "x").unwrap();
        drop(scratch);
        assert_eq!(names(base.path()), Vec::<String>::new());
    }

    #[test]
    fn only_what_the_dead_have_left_is_cleared() {
        let base = tempfile::tempdir().unwrap();
        let living = Scratch::below(base.path()).unwrap();
        let dead = Scratch::below(base.path()).unwrap();
        let left = dead.path.clone();
        fs::write(left.join("data"), "x").unwrap();
        // As the kernel does when it ends a process: unlocked, and nothing else.
        dead._claim.unlock().unwrap();
        std::mem::forget(dead);
        let unclaimed = base.path().join(format!("{PREFIX}of-somebody"));
        fs::create_dir(&unclaimed).unwrap();
        clear(base.path());
        assert!(!left.exists() && living.path().exists() && unclaimed.exists());
    }
}
