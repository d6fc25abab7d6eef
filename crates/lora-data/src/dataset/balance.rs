//! Repeats of regularization images, so that an epoch holds about as many as training images.

/// Repeats per regularization image after balancing; 0 means it is never used.
///
/// `given` holds the repeats of each regularization image in load order. In the
/// first round each image counts with its own repeats, then one repeat is added
/// to one image after the other until they are as many as `train` (training
/// images times repeats).
///
/// ```
/// use lora_data::balance_regularization;
///
/// assert_eq!(balance_regularization(37, &[1, 1, 1, 2]), [9, 9, 9, 10]);
/// assert_eq!(balance_regularization(3, &[2, 2, 2]), [2, 2, 0]);
/// ```
pub fn balance_regularization(train: usize, given: &[u32]) -> Vec<u32> {
    let mut repeats = vec![0u32; given.len()];
    let mut count = 0usize;
    for (repeats, &given) in repeats.iter_mut().zip(given) {
        if count < train {
            *repeats = given;
            count += given as usize;
        }
    }
    if given.is_empty() || count >= train {
        return repeats;
    }
    let missing = train - count;
    let (rounds, rest) = (missing / given.len(), missing % given.len());
    for (i, repeats) in repeats.iter_mut().enumerate() {
        *repeats += rounds as u32 + u32::from(i < rest);
    }
    repeats
}
