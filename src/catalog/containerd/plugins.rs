//! What containerd is made of.

use std::path::{Path, PathBuf};

use tonic::Request;

use super::{CALL_DEADLINE, Containerd, ContainerdError, MAX_MESSAGE};
use crate::proto::introspection::v1::PluginsRequest;
use crate::proto::introspection::v1::introspection_client::IntrospectionClient;
use crate::sync::{blocking, may_block};

/// Differs among its plugins.
const DIFFERS: &str = "type==io.containerd.differ.v1";
/// What a plugin in another process exports: the socket that it is reached by.
const ADDRESS: &str = "address";

impl Containerd {
    /// Whether one of its differs is reached at the socket `address`. 1.6 has none in other processes.
    ///
    /// # Errors
    /// [`ContainerdError`] if it does not answer.
    pub async fn has_differ(&self, address: &Path) -> Result<bool, ContainerdError> {
        let mut request = Request::new(PluginsRequest {
            filters: vec![DIFFERS.to_owned()],
        });
        request.set_timeout(CALL_DEADLINE);
        let mut client = IntrospectionClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE);
        let answer = client.plugins(request).await;
        let answer = answer.map_err(|status| self.error("tell its plugins", status))?;
        let plugins = answer.into_inner().plugins;
        let ours = address.to_owned();
        let has = blocking(move || {
            let mut addresses = plugins.iter().filter_map(|plugin| plugin.exports.get(ADDRESS));
            addresses.any(|theirs| is_same(theirs, &ours))
        });
        Ok(has.await)
    }
}

/// Whether containerd's word for a socket means this one: by another path, perhaps (`/var/run`).
fn is_same(theirs: &str, ours: &Path) -> bool {
    may_block();
    let theirs = Path::new(theirs.strip_prefix("unix://").unwrap_or(theirs));
    let real = |path: &Path| -> Option<PathBuf> {
        // The socket may be gone at this moment.
        Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?))
    };
    theirs == ours || real(theirs).is_some_and(|theirs| real(ours) == Some(theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_known_by_any_of_its_paths() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        std::os::unix::fs::symlink(&run, dir.path().join("var-run")).unwrap();
        let ours = run.join("lazuli.sock");
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        assert!(is_same(&text(ours.clone()), &ours));
        assert!(is_same(&format!("unix://{}", ours.display()), &ours));
        assert!(is_same(&text(dir.path().join("var-run/lazuli.sock")), &ours));
        assert!(!is_same(&text(dir.path().join("lazuli.sock")), &ours));
        assert!(!is_same(&text(run.join("other.sock")), &ours));
        assert!(!is_same("/nowhere/lazuli.sock", &ours));
        assert!(!is_same("", &ours));
    }
}
