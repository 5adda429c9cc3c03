package v1

// UserAnnotation, in a runtime configuration given to Runner.Create, carries a
// user that the image names ("www-data:www-data"). The guest looks it up in the
// container's /etc/passwd and /etc/group, which only it can read.
const UserAnnotation = "dev.tatami.image.user"
