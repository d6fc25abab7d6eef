//! Memory between operations.

/// Asks the C allocator to keep freed memory for the next operation instead of
/// returning it to the system, which would fill it with zeros again, page by page:
/// tensors of a few megabytes cost several times as much then.
///
/// For programs, at their start; a library should not decide this. Does nothing
/// where the allocator is not glibc's.
#[cfg_attr(all(target_os = "linux", target_env = "gnu"), allow(unsafe_code))]
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only changes tuning parameters of the allocator; it is called
    // with documented parameters and may be called at any time.
    unsafe {
        // Never a mapping of its own for one block, never give memory back.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
